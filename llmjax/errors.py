"""The one exception that a user is meant to see."""


class UserError(Exception):
    """A mistake in the input, said in one line: what is wrong, where, and what to do.

    `llmjax.commands.base.call` prints the message alone (no traceback) and exits with status 2. Raise it for anything that
    users can cause and mend: a wrong field, a missing file, a corrupt line, an impossible mesh. Bugs keep their traceback.
    """
