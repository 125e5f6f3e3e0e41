"""Preparation of a text corpus (read, tokenise, pack on disk) against the bare `encode_batch_fast` of `tokenizers`.

    python benchmarks/prepare_text.py --check                                   (the built-in world's text, 1 GB)
    python benchmarks/prepare_text.py --path='novels/*.jsonl.gz' --check        (your own, repeated to 1 GB)

Printed: tokens/s of both, measured in turn on equal parts of the corpus, each time in a process of its own. Then, for the
whole of it: the most memory that the process held above what the libraries take, bytes a token on disk, the time of a start
that goes on in the middle. The corpus is a jsonl file of one document a line. `--check` exits with 1 when a bar is missed.
Run it on a quiet machine.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

from absl import app, flags

SPEED, MEMORY, BYTES = 0.8, 1.5e9, 4.0  # bars: share of the peer's tokens/s, bytes, bytes a token
PART = 32 * 2**20  # bytes of the corpus that one turn of the comparison tokenises

_CHECK = flags.DEFINE_bool("check", False, "exit with 1 when a bar is missed")
_PATH = flags.DEFINE_string("path", "", "jsonl(.gz), txt(.gz) or parquet files with text; default: the built-in world")
_MEGABYTES = flags.DEFINE_integer("megabytes", 1000, "size of the corpus")
_VOCAB = flags.DEFINE_integer("vocab_size", 8192, "of the tokenizer that is trained on the beginning of the corpus")
_ROUNDS = flags.DEFINE_integer("rounds", 4, "turns of each side")
_WORKER = flags.DEFINE_string("worker", "", "internal: folder to prepare in, of its own process")
_TURN = flags.DEFINE_list("turn", [], "internal: corpus, tokenizer and, for our side, folder of one turn in its own process")


def peak() -> int:
    """The most memory that this process has held, bytes."""
    status = open("/proc/self/status").read()
    return int(re.search(r"VmHWM:\s+(\d+)", status).group(1)) * 1024


def make_corpus(path: str, target: str, size: int) -> None:
    """A jsonl file of at least `size` bytes: the documents of `path`, over and over."""
    from llmjax.data.sources import Text
    from llmjax.tasks.world.data import WorldText

    class Here:
        seed = 0

        def data_path(self, *parts):
            return os.path.join(os.path.dirname(target), *parts)

    train = (Text(path=path) if path else WorldText()).read(Here()).train
    written = 0
    with open(target, "w", encoding="utf-8") as file:
        while written < size:
            for text in train:
                written += file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                if written >= size:
                    break


def part_of(corpus: str, target: str, number: int) -> None:
    """The `number`-th PART of the corpus, whole lines."""
    with open(corpus, "rb") as file, open(target, "wb") as out:
        file.seek(number * PART)
        if number:
            file.readline()
        written = 0
        while written < PART and (line := file.readline()):
            written += out.write(line)


def train_tokenizer(corpus: str, folder: str) -> None:
    from llmjax.data.reading import read_records
    from llmjax.data.tokenizer import Tokenizer, TokenizerConfig

    texts = (record["text"] for _, record in read_records(corpus))
    Tokenizer.train(texts, TokenizerConfig(vocab_size=_VOCAB.value, train_chars=2 * 10**7)).save(folder)


def theirs(corpus: str, tokenizer: str) -> float:
    """Tokens/s of encode_batch_fast alone, on batches of documents that are in memory already."""
    import tokenizers

    peer = tokenizers.Tokenizer.from_file(os.path.join(tokenizer, "tokenizer.json"))
    texts = [json.loads(line)["text"] for line in open(corpus, encoding="utf-8")]
    count, began = 0, time.perf_counter()
    for start in range(0, len(texts), 1024):
        count += sum(map(len, peer.encode_batch_fast(texts[start : start + 1024], add_special_tokens=False)))
    return count / (time.perf_counter() - began)


def ours(corpus: str, tokenizer: str, folder: str, stop_after: int = 0) -> tuple[float, int, int]:
    """Tokens/s, tokens, bytes on disk of everything that preparation does: a first pass that checks every record and says which
    are held out, then both splits. stop_after: give up after so many tokens."""
    from llmjax.data.shards import write_shards
    from llmjax.data.sources import Text
    from llmjax.data.tokenizer import Tokenizer
    from llmjax.stages.datasets import encode_text

    loaded = Tokenizer.load(tokenizer)

    def progress(tokens: int) -> None:
        if stop_after and tokens > stop_after:
            raise KeyboardInterrupt

    began, tokens, size = time.perf_counter(), 0, 0
    splits = Text(path=corpus).read(None)
    for name, texts in {"train": splits.train, **splits.held_out}.items():
        made = write_shards(
            os.path.join(folder, name), lambda skip, texts=texts: encode_text(loaded, texts, skip),
            vocab_size=loaded.vocab_size, progress=progress,
        )  # fmt: skip
        tokens += len(made)
        size += sum(entry.stat().st_size for entry in os.scandir(os.path.join(folder, name)))
    return tokens / (time.perf_counter() - began), tokens, size


def worker(folder: str) -> None:
    """The whole corpus in a process of its own, for its memory; then once more from where a first try was cut off."""
    import llmjax.stages.datasets  # noqa: F401 the libraries, before the memory is counted

    corpus, tokenizer = os.path.join(folder, "corpus.jsonl"), os.path.join(folder, "tokenizer")
    before = peak()
    rate, tokens, size = ours(corpus, tokenizer, os.path.join(folder, "whole"))
    memory = peak() - before
    try:
        ours(corpus, tokenizer, os.path.join(folder, "cut"), stop_after=tokens // 2)
    except KeyboardInterrupt:
        began = time.perf_counter()
        ours(corpus, tokenizer, os.path.join(folder, "cut"))
        resumed = time.perf_counter() - began
    files = [path.relative_to(f"{folder}/whole") for path in sorted(pathlib.Path(folder, "whole").rglob("*.bin"))]
    same = all(pathlib.Path(folder, "whole", f).read_bytes() == pathlib.Path(folder, "cut", f).read_bytes() for f in files)
    found = {"rate": rate, "tokens": tokens, "memory": memory, "bytes": size / tokens, "resumed": resumed, "same": same}
    print(json.dumps(found))


def turn(*paths: str) -> float:
    """Tokens/s of one side, ours if a folder to write to is given, in a process that has done nothing else."""
    command = [sys.executable, __file__, f"--turn={','.join(paths)}"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main(argv: list[str]) -> None:
    del argv
    if _TURN.value:
        print(theirs(*_TURN.value) if len(_TURN.value) == 2 else ours(*_TURN.value)[0])
        return
    if _WORKER.value:
        worker(_WORKER.value)
        return
    with tempfile.TemporaryDirectory() as folder:
        corpus, tokenizer = os.path.join(folder, "corpus.jsonl"), os.path.join(folder, "tokenizer")
        make_corpus(_PATH.value, corpus, _MEGABYTES.value * 10**6)
        train_tokenizer(corpus, tokenizer)
        print(f"corpus {os.path.getsize(corpus) / 1e6:,.0f} MB, vocabulary {_VOCAB.value:,}", flush=True)
        ratios = []
        for number in range(_ROUNDS.value):
            part = os.path.join(folder, f"part{number}.jsonl")
            part_of(corpus, part, number)
            peer = turn(part, tokenizer)
            own = turn(part, tokenizer, os.path.join(folder, f"shards{number}"))
            ratios.append(own / peer)
            print(f"  turn {number + 1}: {own:,.0f} tokens/s, "
                  f"encode_batch_fast alone {peer:,.0f}: {own / peer:.2f}x", flush=True)
        command = [sys.executable, __file__, f"--worker={folder}"]
        whole = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    ratio = statistics.median(ratios)
    print(f"whole: {whole['tokens'] / 1e6:,.1f} M tokens, {whole['rate']:,.0f} tokens/s, goes on in the middle in "
          f"{whole['resumed']:.0f} s, {'to the same files' if whole['same'] else 'to OTHER files'}")  # fmt: skip
    bars = [
        (f"{ratio:.2f}x the speed of encode_batch_fast (bar {SPEED})", ratio >= SPEED),
        (f"{whole['memory'] / 1e9:.2f} GB above the libraries (bar {MEMORY / 1e9})", whole["memory"] <= MEMORY),
        (f"{whole['bytes']:.2f} bytes a token on disk (bar {BYTES:.0f})", whole["bytes"] <= BYTES),
        ("what was cut off goes on to the same files", whole["same"]),
    ]
    from workers import report

    report(bars, _CHECK.value)


if __name__ == "__main__":
    app.run(main)
