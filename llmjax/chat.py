"""llmjax-chat --workdir=runs/quickstart: talk to the model that a run has made; it writes token after token."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from absl import flags

from llmjax.errors import UserError
from llmjax.main import call, parse_flags

USAGE = """llmjax-chat talks with the newest model of a finished run.

  llmjax-chat --workdir=runs/quickstart
  llmjax-chat --workdir=runs/quickstart --stage=sft --message="What is 3 plus 4?"
"""
CHAT_STAGES = ("ppo", "sft", "pretrain")


def define_flags() -> flags.FlagValues:
    """The flags of llmjax-chat, with their defaults."""
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "folder of a finished run", flag_values=values)
    flags.DEFINE_enum("stage", None, CHAT_STAGES, "whose model; default: the last one there is", flag_values=values)
    flags.DEFINE_string("message", None, "answer this one message and stop", flag_values=values)
    flags.DEFINE_float("temperature", 0.0, "of sampling; 0 takes the likeliest token", flag_values=values)
    flags.DEFINE_integer("max_new_tokens", 128, "longest answer, in tokens", flag_values=values)
    flags.DEFINE_integer("seed", 0, "of sampling", flag_values=values)
    flags.DEFINE_bool("help", False, "show this help", flag_values=values)
    return values


class Chat:
    """A model with its tokenizer and a dialogue so far."""

    def __init__(self, workdir: str, stage: str | None, temperature: float, max_new_tokens: int, seed: int):
        import jax

        from llmjax.generation.sampling import SamplingConfig
        from llmjax.stages.pipeline import open_run

        self.run = open_run(workdir)
        done = [s for s in CHAT_STAGES if self.run.result(s) is not None]
        if not done or (stage and stage not in done):
            there = ", ".join(done) or "none"
            raise UserError(f"--workdir={workdir}: stage {stage or 'pretrain'} is not complete there; there is {there}")
        self.stage = stage or done[0]
        self.params = self.run.load_lm(self.stage)
        self.sampling = SamplingConfig(max_new_tokens, temperature)
        self.sampling.validate()
        self.messages: list[dict[str, str]] = []
        self._key = jax.random.key(seed)

    def answer(self, message: str) -> Iterator[str]:
        """Adds the user's message to the dialogue and yields the answer piece by piece."""
        import jax

        from llmjax.data.chat import encode_chat
        from llmjax.data.tokenizer import DecodeStream
        from llmjax.generation.decode import stream

        self.messages.append({"role": "user", "content": message})
        tokens = encode_chat(self.run.tokenizer, self.messages, add_generation_prompt=True).tokens
        self._key, key = jax.random.split(self._key)
        decoder, text = DecodeStream(self.run.tokenizer), ""
        for token in stream(self.params, tokens, key, cfg=self.run.model, sampling=self.sampling,
                            end_id=self.run.tokenizer.end_id):  # fmt: skip
            piece = decoder.step(token)
            text += piece
            yield piece
        if rest := decoder.finish():
            text += rest
            yield rest
        self.messages.append({"role": "assistant", "content": text.strip()})


def run(argv: Sequence[str]) -> None:
    """The program, without the handling of errors."""
    values = define_flags()
    parse_flags(argv, values, USAGE)
    if not values.workdir:
        raise UserError("--workdir is missing; give the folder of a finished run, e.g. --workdir=runs/quickstart")
    chat = Chat(values.workdir, values.stage, values.temperature, values.max_new_tokens, values.seed)
    if values.message is not None:
        _say(chat.answer(values.message))
        return
    print(f"the {chat.stage} model of {values.workdir}; an empty line ends the chat, /new starts a new dialogue")
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
