"""llmjax-chat --workdir=runs/quickstart: talk to a model; it writes token after token."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from llmjax.commands.base import call, parse_flags
from llmjax.config import validate
from llmjax.data.records import Message
from llmjax.errors import UserError

if TYPE_CHECKING:
    from llmjax.runs.models import LanguageModel

USAGE = """llmjax-chat talks with the newest model of a run, with another stage's, or with any model in a folder.

  llmjax-chat --workdir=runs/quickstart
  llmjax-chat --workdir=runs/quickstart --stage=sft --message="What is 3 plus 4?"
  llmjax-chat --model=models/Qwen3-0.6B
"""


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
    flags.DEFINE_float("temperature", 0.0, "of sampling; 0 takes the likeliest token", flag_values=values)
    flags.DEFINE_integer("max_new_tokens", 128, "longest answer, in tokens", flag_values=values)
    flags.DEFINE_integer("seed", 0, "of sampling", flag_values=values)
    flags.DEFINE_bool("help", False, "show this help", flag_values=values)
    return values


class Chat:
    """A model with its tokenizer and a dialogue so far."""

    def __init__(
        self, model: LanguageModel, temperature: float = 0.0, max_new_tokens: int = 128, seed: int = 0,
        notice: Callable[[str], None] = lambda line: None,
    ):  # fmt: skip
        import jax

        from llmjax.generation.sampling import SamplingConfig
        from llmjax.models.transformer import unstacked

        self.sampling = SamplingConfig(max_new_tokens, temperature)
        validate(self.sampling)
        self.cfg, self.tokenizer = model.cfg, model.tokenizer()
        self.params = unstacked(model.load("float32"), self.cfg)
        self.messages: list[Message] = []
        self._key = jax.random.key(seed)
        self._notice, self._lengths = notice, set[int]()

    def answer(self, message: str) -> Iterator[str]:
        """Adds the user's message to the dialogue and yields the answer piece by piece. `notice` of the constructor is told
        when that has to compile first."""
        import jax

        from llmjax.data.template import encode_chat
        from llmjax.data.tokenizer import DecodeStream
        from llmjax.generation.decode import padded_length, stream

        self.messages.append(Message("user", message))
        tokens = encode_chat(self.tokenizer, self.messages, add_generation_prompt=True).tokens
        if (length := padded_length(tokens)) not in self._lengths:
            self._lengths.add(length)
            self._notice(f"compiling for dialogues of up to {length} tokens ...")
        self._key, key = jax.random.split(self._key)
        decoder, text = DecodeStream(self.tokenizer), ""
        stop_ids: Any = self.tokenizer.stop_ids
        for token in stream(self.params, tokens, key, cfg=self.cfg, sampling=self.sampling, stop_ids=stop_ids):
            piece = decoder.step(token)
            text += piece
            yield piece
        if rest := decoder.finish():
            text += rest
            yield rest
        self.messages.append(Message("assistant", text.strip()))


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
    chat = Chat(model, values.temperature, values.max_new_tokens, values.seed, _notice)
    if values.message is not None:
        _say(chat.answer(values.message))
        return
    print(f"the {name}; an empty line ends the chat, /new starts a new dialogue")
    while message := _read():
        if message == "/new":
            chat.messages.clear()
            continue
        _say(chat.answer(message))


def _read() -> str:
    try:
        return input("you> ").strip()
    except EOFError:
        return ""


def _notice(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _say(pieces: Iterator[str]) -> None:
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()


def main() -> None:
    """The console command llmjax-chat."""
    call(run, sys.argv)


if __name__ == "__main__":
    main()
