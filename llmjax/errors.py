"""What a user is meant to see: a mistake, and that a run was stopped."""


class UserError(Exception):
    """A mistake in the input, said in one line: what is wrong, where, and what to do.

    `llmjax.commands.base.call` prints the message alone (no traceback) and exits with status 2. Raise it for anything that
    users can cause and mend: a wrong field, a missing file, a corrupt line, an impossible mesh. Bugs keep their traceback.
    """


class Stopped(BaseException):
    """A signal has ended the run. `llmjax.commands.base.call` says so; the exit status, 75, means "try again" to launchers."""

    def __init__(self, words: str, signal: str):
        super().__init__(words)
        self.signal = signal
