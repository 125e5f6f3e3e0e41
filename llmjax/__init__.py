"""llmjax: text -> base model -> SFT -> reward model -> PPO, dense or sparse, in JAX, from one experiment file."""

__version__ = "0.1.0"
