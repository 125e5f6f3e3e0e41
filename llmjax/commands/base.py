"""What all commands share: flags, one-line errors, exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import flags

from llmjax import runtime
from llmjax.errors import Stopped, UserError
from llmjax.files import DISK_ERRORS


def parse_flags(argv: Sequence[str], values: flags.FlagValues, usage: str) -> None:
    """Parses argv into `values`; a wrong flag or a stray argument is a UserError; --help prints and exits with 0."""
    try:
        rest = values(list(argv))
    except flags.Error as error:
        raise UserError(f"{' '.join(str(error).split())}; --help lists the flags") from error
    if values.help:
        print(usage + values.get_help())
        sys.exit(0)
    if rest[1:]:
        raise UserError(f"unexpected argument {rest[1]!r}; flags are written --name=value, --help lists them")


def call(program: Callable[[Sequence[str]], None], argv: Sequence[str], interrupted: str = "stopped") -> None:
    """Prepares the process, runs program(argv), and turns a UserError into one line on stderr and exit status 2; and so an
    OSError of a disk that is full or may not be written to.

    interrupted: what to say after Ctrl-C, whose exit status is 130. That of other signals is 75, "try again" (EX_TEMPFAIL).
    """
    runtime.keep_freed_memory()
    runtime.quiet_libraries()
    try:
        program(argv)
        sys.stdout.flush()
    except UserError as error:
        _fail(argv, str(error))
    except KeyboardInterrupt:
        _leave(interrupted, 130)
    except Stopped as stopped:
        _leave(f"{stopped}; the same command goes on", 130 if stopped.signal == "SIGINT" else os.EX_TEMPFAIL)
    except BrokenPipeError:  # whoever read our output has gone, as in `llmjax --help | head`
        _drop_output()
        sys.exit(1)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        _drop_output()
        where = f"{error.filename}: " if error.filename else ""
        _fail(argv, f"{where}{error.strerror}; see that there is room and that it may be written, and the same command goes on")


def _fail(argv: Sequence[str], words: str) -> NoReturn:
    name = argv[0].rsplit("/", 1)[-1]
    print(f"{'llmjax' if name == '__main__.py' else name}: {words}", file=sys.stderr)
    sys.exit(2)


def _drop_output() -> None:
    """What is still to be printed cannot be; without this the interpreter would complain as it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _leave(words: str, status: int) -> None:
    """Ends the process at once: a tokenizer that is still being learnt in a thread would not let the interpreter end."""
    print(words, file=sys.stderr)
    sys.stdout.flush()
    os._exit(status)
