"""An experiment from its first stage to its last; what it leaves in its working directory, and the models there."""
