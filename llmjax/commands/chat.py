"""llmjax-chat --workdir=runs/quickstart: talk to a model, or let a base model go on with a text; token after token."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from llmjax.commands.base import call, parse_flags
from llmjax.config import validate
from llmjax.data.records import Message
from llmjax.errors import UserError

if TYPE_CHECKING:
    from llmjax.runs.models import LanguageModel

USAGE = """llmjax-chat talks with the newest model of a run, with another stage's, or with any model in a folder. A base
model, which has not learnt to answer, goes on with a text.

  llmjax-chat --workdir=runs/quickstart
  llmjax-chat --workdir=runs/quickstart --stage=sft --message="What is 3 plus 4?"
  llmjax-chat --workdir=runs/quickstart --stage=pretrain --message="Once upon a time"
  llmjax-chat --model=models/Qwen3-0.6B
"""

HELP = "Ctrl-C stops an answer, an empty line ends the program"
COMPILING = "(compiling: the first answer takes longer)"


def define_flags() -> flags.FlagValues:
    """The flags of llmjax-chat, with their defaults."""
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "folder of a run", flag_values=values)
    flags.DEFINE_string("stage", None, "whose model of that run; default: the last one there is", flag_values=values)
    flags.DEFINE_string(
        "model", None, "in place of a run: a Hugging Face folder, a converted checkpoint, or the folder of a stage",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string("message", None, "answer this one message and stop", flag_values=values)
    flags.DEFINE_bool(
        "plain", None, "go on with a text, without the chat template; default: as the model has learnt it", flag_values=values
    )  # fmt: skip
    flags.DEFINE_float("temperature", 0.0, "of sampling; 0 takes the likeliest token", flag_values=values)
    flags.DEFINE_integer("max_new_tokens", 128, "longest answer, in tokens", flag_values=values)
    flags.DEFINE_integer("seed", 0, "of sampling", flag_values=values)
    flags.DEFINE_bool("help", False, "show this help", flag_values=values)
    return values


class Chat:
    """A model with its tokenizer and a dialogue so far.

    plain: whether it goes on with texts instead, each by itself. context: tokens of the newest text or dialogue, what was
    written included. length: see `LanguageModel`.
    """

    def __init__(
        self, model: LanguageModel, temperature: float = 0.0, max_new_tokens: int = 128, seed: int = 0,
        plain: bool | None = None,
    ):
        """plain: None for what the model has learnt."""
        import jax

        from llmjax.generation.sampling import SamplingConfig
        from llmjax.models.transformer import unstacked

        self.sampling = SamplingConfig(max_new_tokens, temperature)
        validate(self.sampling)
        self.cfg, self.tokenizer, self.length = model.cfg, model.tokenizer(), model.length
        if (tokens := self.tokenizer.vocab_size) > self.cfg.vocab_size:
            raise UserError(f"the tokenizer has {tokens} tokens, the model only {self.cfg.vocab_size}; give it its own")
        self.plain = not model.chats if plain is None else plain
        self.params = unstacked(model.load("float32"), self.cfg)
        self.messages: list[Message] = []
        self.context = 0
        self._key = jax.random.key(seed)

    def answer(self, message: str) -> Generator[str]:
        """Adds the user's message to the dialogue and yields the answer, or what follows the text, piece by piece.

        What was written before the generator is closed or interrupted is the answer; a message without any is forgotten.
        """
        import jax

        from llmjax.data.tokenizer import DecodeStream
        from llmjax.generation.decode import stream

        tokens = self._prompt(message)
        self._key, key = jax.random.split(self._key)
        decoder, text = DecodeStream(self.tokenizer), ""
        for token in tokens if self.plain else ():  # what follows may begin with a space, or in the middle of a character
            decoder.step(token)
        stop_ids: Any = self.tokenizer.stop_ids
        self.messages.append(Message("user", message))
        self.context = len(tokens)
        try:
            for token in stream(self.params, tokens, key, cfg=self.cfg, sampling=self.sampling, stop_ids=stop_ids):
                self.context += 1
                piece = decoder.step(token)
                text += piece
                yield piece
            if rest := decoder.finish():
                text += rest
                yield rest
        finally:
            if text.strip():
                self.messages.append(Message("assistant", text.strip()))
            else:
                self.messages.pop()

    def _prompt(self, message: str) -> list[int]:
        """The tokens to go on from."""
        from llmjax.data.template import encode_chat

        if self.plain:
            return [self.tokenizer.bos_id, *self.tokenizer.encode(message)]
        messages = [*self.messages, Message("user", message)]
        return encode_chat(self.tokenizer, messages, add_generation_prompt=True).tokens


def run(argv: Sequence[str]) -> None:
    """The program, without the handling of errors."""
    values = define_flags()
    parse_flags(argv, values, USAGE)
    if bool(values.workdir) == bool(values.model):
        raise UserError("give --workdir, the folder of a run, or --model, the folder of a model; --help shows examples")
    if values.model and values.stage:
        raise UserError(f"--stage={values.stage} goes with --workdir; --model names a model's own folder")
    from llmjax.runs.models import open_model, open_stage

    if values.model:
        name, model = f"model {values.model}", open_model(values.model)
    else:
        stage, model = open_stage(values.workdir, values.stage or "")
        name = f"{stage} model of {values.workdir}"
    chat = Chat(model, values.temperature, values.max_new_tokens, values.seed, values.plain)
    if values.message is not None:
        _say(chat, values.message, first=True)
        return
    if chat.plain:
        kind = "" if model.chats else ", a base model"
        print(f"the {name}{kind}: it goes on with your text, each line by itself; {HELP}")
    else:
        print(f"the {name}; {HELP}, /new starts a new dialogue")
    _converse(chat)


def _converse(chat: Chat) -> None:
    """Reads and answers until the user ends it."""
    with contextlib.suppress(ImportError):  # some Pythons are built without it
        import readline  # noqa: F401 - gives `input` line editing and a history

    first, said = True, False
    while message := _read("text> " if chat.plain else "you> "):
        if message == "/new" and not chat.plain:
            chat.messages.clear()
            continue
        try:
            _say(chat, message, first)
        except KeyboardInterrupt:
            print(" ... stopped")
        first = False
        if 0 < chat.length < chat.context and not said:
            said = True
            again = "" if chat.plain else "; /new starts a new dialogue"
            print(f"({chat.context:,} tokens, and the model was trained on {chat.length:,} at most: "
                  f"it reads all of them, but may write worse{again})")  # fmt: skip


def _read(prompt: str) -> str:
    """What the user types; empty to end the program, as Ctrl-C and Ctrl-D do too."""
    try:
        return input(prompt).strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return ""


def _say(chat: Chat, message: str, first: bool) -> None:
    """Writes the answer as it is made. first: whether the model has to be compiled for it, which a terminal is told."""
    waiting = first and sys.stderr.isatty()
    if waiting:
        print(COMPILING, end="", file=sys.stderr, flush=True)
    with contextlib.closing(chat.answer(message)) as pieces:
        for piece in pieces:
            if waiting:
                print(f"\r{' ' * len(COMPILING)}\r", end="", file=sys.stderr, flush=True)
                waiting = False
            sys.stdout.write(piece)
            sys.stdout.flush()
    print()


def main() -> None:
    """The console command llmjax-chat."""
    call(run, sys.argv)


if __name__ == "__main__":
    main()
