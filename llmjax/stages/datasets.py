"""Records -> token ids on disk -> rows, once per workdir; what is whole is not made again, what was cut off goes on."""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmjax.data.base import Data, check_kind, plural
from llmjax.data.loader import check_enough
from llmjax.data.packing import ExampleRows, Rows, StreamRows, clip_example, left_pad
from llmjax.data.records import Completion, Dialogue, Message, Prompt, Ranking
from llmjax.data.shards import Block, Shards, is_complete, write_shards
from llmjax.data.sources import Piece, cut_pieces
from llmjax.data.store import Store
from llmjax.data.template import encode_chat
from llmjax.data.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.files import SEAL, damage, read_json, seal, write_json_atomic
from llmjax.results import Metric, Source
from llmjax.stages.base import Context

ENCODE_CHARS, ENCODE_DOCUMENTS = 2**22, 4096  # of text tokenised at once
ENCODE_RECORDS = 256
ASKED = 1024
_SPLITS = "splits.json"
_OF = "left_out_of_tokens_"  # and a number: counts the dialogues of that length that were left out
SAY_SECONDS = 10.0


@dataclass(frozen=True)
class Parts:
    """Rows of the sources that a stage's data are mixed of, by name. train: with weights. held_out: split -> rows of each.

    notes: what was read, cut and left out, in words; metrics: in numbers.
    """

    train: Mapping[str, tuple[Rows, float]]
    held_out: Mapping[str, Mapping[str, Rows]]
    notes: Sequence[str]
    metrics: Sequence[Metric] = ()


def text_rows(context: Context, data: Data, length: int) -> Parts:
    """Documents as packed windows of `length` tokens."""
    tokenizer = context.tokenizer

    def blocks(documents: Iterable[str]) -> Callable[[int], Iterator[Block]]:
        return lambda skip: encode_text(tokenizer, documents, skip)

    def rows(shards: Shards) -> StreamRows:
        return StreamRows(shards, length, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)

    return _parts(context, data, "text", str, (), blocks, rows, masked=False)


def dialogue_rows(context: Context, data: Data, length: int) -> Parts:
    """Dialogues as packed windows of `length` tokens, with the loss mask on the assistant's tokens."""
    tokenizer = context.tokenizer

    def blocks(dialogues: Iterable[Dialogue]) -> Callable[[int], Iterator[Block]]:
        return lambda skip: encode_dialogues(tokenizer, dialogues, length, skip)

    def rows(shards: Shards) -> ExampleRows:
        return ExampleRows(shards, length, pad_id=tokenizer.pad_id)

    return _parts(context, data, "dialogues", Dialogue, (length,), blocks, rows, masked=True)


def _parts(context: Context, data: Data, kind: str, record: type, key: tuple, blocks, rows, masked: bool) -> Parts:
    check_kind(f"{context.name}.data", data, record)
    train, held_out, notes, metrics, sources = {}, {}, [], [], []
    for name, (source, weight) in data.parts().items():
        folder = context.cache_path(kind, source, *key)
        splits, note = _splits(context, source, folder, blocks, masked)
        line, numbers = _fit(splits["train"], name) if masked else ("", [])
        notes += [f"{name + ': ' if name else ''}{line}" for line in (note, line) if line]
        metrics += numbers
        if line:
            context.say(notes[-1])
        train[name] = rows(splits["train"]), weight
        for split, shards in splits.items():
            if split != "train":
                held_out.setdefault(split, {})[name] = rows(shards)
        counts, others = splits["train"].counts, [_records(one) for split, one in splits.items() if split != "train"]
        sources.append(Source(
            name, plural(record), _records(splits["train"]), len(splits["train"]), counts["bytes"], sum(others),
            counts["truncated"], counts["dropped"], note,
        ))  # fmt: skip
    context.found(data, sources)
    return Parts(train, held_out, notes, metrics)


def _splits(context: Context, source: Data, folder: str, blocks, masked: bool) -> tuple[dict[str, Shards], str]:
    """The shards of each split of a source, and what was found."""

    def make() -> dict[str, Any]:
        found = context.read(source)
        for split, records in {"train": found.train, **found.held_out}.items():
            write_shards(
                os.path.join(folder, split), blocks(records), vocab_size=context.tokenizer.vocab_size, masked=masked,
                progress=_progress(context, split),
            )  # fmt: skip
        return {"held_out": list(found.held_out), "note": found.note}

    about = prepared(context, folder, make)
    return {split: Shards(os.path.join(folder, split)) for split in ("train", *about["held_out"])}, about["note"]


def _records(shards: Shards) -> int:
    """Documents, or dialogues that were kept."""
    return shards.counts["documents"] + shards.counts["kept"]
def prepared(context: Context, folder: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` says of the data that it writes below `folder`, in this run or an earlier one.

    It goes on where it was cut off. What is complete is sealed, and looked at again when a run begins: data that are damaged
    are removed and made anew, and that is said.
    """
    index, sealed = os.path.join(folder, _SPLITS), os.path.exists(os.path.join(folder, SEAL))
    if folder not in context.whole:
        if sealed and (reason := damage(folder)):
            context.say(f"the prepared data in {folder} are damaged ({reason}); they are made anew")
            shutil.rmtree(folder)
            sealed = False
        if not sealed:
            write_json_atomic(index, make())
            seal(folder, context.experiment.checkpoint_digests)
        context.whole.add(folder)
    return read_json(index)


def _progress(context: Context, split: str) -> Callable[[int], None]:
    """Says now and then how far tokenising is."""
    began = said = time.monotonic()

    def progress(tokens: int) -> None:
        nonlocal said
        if time.monotonic() - said > SAY_SECONDS:
            said = time.monotonic()
            context.say(f"{tokens / 1e6:,.1f} M tokens of {split} text, {tokens / (said - began):,.0f} tokens/s")

    return progress


def _fit(shards: Shards, source: str) -> tuple[str, list[Metric]]:
    """How many dialogues of a source are cut to length and left out, and the length that would hold 99 % of them."""
    kept, truncated, dropped = (shards.counts.get(name, 0) for name in ("kept", "truncated", "dropped"))
    left_out = [(int(key.removeprefix(_OF)), count) for key, count in shards.counts.items() if key.startswith(_OF)]
    sizes = [shards.lengths(), *(np.full(count, tokens) for tokens, count in left_out)]
    length = int(np.percentile(np.concatenate(sizes), 99, method="higher")) - 1  # the last token is a target only
    line = (
        f"of {kept + dropped:,} dialogues {truncated:,} are cut to length, {dropped:,} left out since their answers begin "
        f"behind it; length={length} would hold 99 %"
    )
    suffix, told = (f"/{source}" if source else ""), bool(truncated or dropped)
    numbers = [
        ("dialogues", kept + dropped, "Dialogues", "examples"), ("dialogues_cut", truncated, "Cut to length", "examples"),
        ("dialogues_left_out", dropped, "Left out, too long", "examples"),
        ("length_for_99", length, "Length that holds 99 %", "tokens"),
    ]  # fmt: skip
    return line if told else "", [
        Metric(f"{name}{suffix}", value, f"{label}{': ' + source if source else ''}" if told else "", unit)
        for name, value, label, unit in numbers
    ]


# ---- encoding -----------------------------------------------------------------------------------------------------


def encode_text(tokenizer: Tokenizer, documents: Iterable[str], skip: int = 0) -> Iterator[Block]:
    """<bos> and the tokens of each document, and <eos> where that is another token; `skip` texts are passed over."""
    bos, eos = [tokenizer.bos_id], [tokenizer.eos_id] if tokenizer.eos_id != tokenizer.bos_id else []
    texts: list[str] = []
    edges: list[tuple[bool, bool]] = []  # whether a text begins, and whether it ends, a document
    begins, chars, num_bytes, consumed = True, 0, 0, 0

    def block() -> Block:
        flat: list[int] = []
        number = 0
        for ids, (first, last) in zip(tokenizer.encode_batch(texts), edges, strict=True):
            if first and last and not ids:
                continue
            flat += bos + ids if first else ids
            flat += eos if last else []
            number += last
        return Block(np.array(flat, np.int32), consumed, counts={"documents": number, "bytes": num_bytes})

    for number, text in enumerate(documents):
        first, begins = begins, not isinstance(text, Piece)
        if number < skip:
            continue
        consumed += 1
        for piece in cut_pieces(text):
            last = not isinstance(piece, Piece) and not isinstance(text, Piece)
            texts.append(piece.removeprefix(" ") if tokenizer.drops_first_space and not first else piece)
            edges.append((first, last))
            first = False
            chars += len(piece)
            num_bytes += len(piece.encode("utf-8", "surrogatepass"))
        if chars >= ENCODE_CHARS or len(texts) >= ENCODE_DOCUMENTS:
            yield block()
            texts, edges, chars, num_bytes, consumed = [], [], 0, 0, 0
    if texts:
        yield block()


def encode_dialogues(tokenizer: Tokenizer, dialogues: Iterable[Dialogue], length: int, skip: int = 0) -> Iterator[Block]:
    """The tokens of each dialogue, at most length + 1 of them, with the loss mask; those without a target are left out."""
    remaining = itertools.islice(dialogues, skip, None)
    while batch := list(itertools.islice(remaining, ENCODE_RECORDS)):
        tokens, masks, lengths, truncated = [], [], [], 0
        left_out: Counter[str] = Counter()
        for dialogue in batch:
            try:
                chat = encode_chat(tokenizer, dialogue.messages, tools=dialogue.tools)
            except UserError as error:
                raise UserError(f"{dialogue.id}: {error}" if dialogue.id else str(error)) from error
            clipped = clip_example(chat.tokens, chat.loss_mask, length)
            if clipped is None:
                left_out[f"{_OF}{len(chat.tokens)}"] += 1
            else:
                tokens.append(clipped[0])
                masks.append(clipped[1])
                lengths.append(len(chat.tokens))
                truncated += len(chat.tokens) > length + 1
        empty = [np.empty(0, np.int32)]
        yield Block(
            np.concatenate(tokens or empty), len(batch), np.array(lengths, np.int32), np.concatenate(masks or empty),
            {"kept": len(tokens), "truncated": truncated, "dropped": len(batch) - len(tokens), **left_out},
        )  # fmt: skip


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """The tokens that an answer goes on from."""
    try:
        return encode_chat(tokenizer, prompt.messages, tools=prompt.tools, add_generation_prompt=True).tokens
    except UserError as error:
        raise UserError(f"prompt {prompt.id}: {error}") from error


def encode_answer(tokenizer: Tokenizer, prompt: Prompt, prompt_tokens: Sequence[int], completion: Completion) -> list[int]:
    """The tokens of an answer behind its prompt, up to the end of turn: those that were sampled, or those of its text."""
    if completion.tokens:
        return list(completion.tokens)
    messages = (*prompt.messages, Message("assistant", completion.text))
    try:
        chat = encode_chat(tokenizer, messages, tools=prompt.tools)
    except UserError as error:
        raise UserError(f"prompt {prompt.id}: {error}") from error
    start = len(prompt_tokens)
    ends = [i for i, learnt in enumerate(chat.loss_mask) if learnt and i >= start]
    if chat.tokens[:start] != list(prompt_tokens) or not ends:
        raise UserError(f"prompt {prompt.id}: the chat template changes the prompt once it is answered; use another template")
    return chat.tokens[start : ends[-1] + 1]


# ---- prompts ------------------------------------------------------------------------------------------------------


class PromptSet(Sequence[Prompt]):
    """Prompts by number, read when asked for, with their tokens."""

    def __init__(self, folder: str):
        self._store = Store(os.path.join(folder, "prompts.jsonl"))
        self._shards = Shards(os.path.join(folder, "tokens"))
        self._stops = np.cumsum(self._shards.lengths())
        self.left_out = self._shards.counts.get("dropped", 0)
        self.num_tokens = len(self._shards)

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return _prompt_from_json(self._store[index])

    def tokens(self, index: int) -> list[int]:
        """The ids of one prompt, ready to be answered."""
        start = int(self._stops[index - 1]) if index else 0
        return self._shards.read(start, int(self._stops[index]))[0].tolist()


class PromptRows:
    """Prompts padded on the left, each `repeats` times: tokens, segment_ids [B * repeats, T], and prompt, its number."""

    def __init__(self, prompts: PromptSet, length: int, pad_id: int, repeats: int = 1):
        self._prompts, self._length, self._pad_id, self._repeats = prompts, length, pad_id, repeats

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, chosen: np.ndarray) -> dict[str, np.ndarray]:
        tokens, segment_ids = left_pad([self._prompts.tokens(int(i)) for i in chosen], self._length, self._pad_id)
        arrays = {"tokens": tokens, "segment_ids": segment_ids, "prompt": np.asarray(chosen, np.int32)}
        return {name: np.repeat(array, self._repeats, axis=0) for name, array in arrays.items()}


def prompt_sets(context: Context, data: Data, length: int) -> dict[str, PromptSet]:
    """The prompts of each split that fit `length` tokens. Raises UserError if none of a split does."""
    check_kind(f"{context.name}: prompts", data, Prompt)
    folder = context.cache_path("prompts", data, length)

    def make() -> dict[str, Any]:
        found = context.read(data)
        for split, prompts in {"train": found.train, **found.held_out}.items():
            _write_prompts(context, prompts, length, os.path.join(folder, split), split)
        return {"held_out": list(found.held_out), "note": found.note}

    about = prepared(context, folder, make)
    sets = {split: PromptSet(os.path.join(folder, split)) for split in ("train", *about["held_out"])}
    train, others = sets["train"], [len(prompts) for split, prompts in sets.items() if split != "train"]
    context.found(data, [
        Source("", "prompts", len(train), train.num_tokens, 0, sum(others), dropped=train.left_out, note=about["note"])
    ])  # fmt: skip
    for split, prompts in sets.items():
        if prompts.left_out:
            context.say(f"{prompts.left_out:,} {split} prompts of more than prompt_length={length} tokens are left out")
    return sets


def held_out_prompts(context: Context, data: Data) -> list[Prompt]:
    """The first held-out prompts of dialogues or rankings, at most ASKED of each source: up to the assistant's first turn."""
    found: list[Prompt] = []
    for source, _ in data.parts().values():
        folder = context.cache_path("asked", source)
        path = os.path.join(folder, "prompts.jsonl")

        def make(source: Data = source, path: str = path) -> dict[str, Any]:
            records = next(iter(context.read(source).held_out.values()))
            Store.write(path, map(_prompt_to_json, itertools.islice(_prompts_of(records), ASKED)))
            return {}

        prepared(context, folder, make)
        store = Store(path)
        found += [_prompt_from_json(store[i]) for i in range(len(store))]
    return found


def _prompts_of(records: Iterable[Any]) -> Iterator[Prompt]:
    for record in records:
        if isinstance(record, Ranking):
            yield record.prompt
        elif isinstance(record, Dialogue):
            first = next(i for i, message in enumerate(record.messages) if message.role == "assistant")
            if first:
                yield Prompt(record.id, record.messages[:first], {}, record.tools)


def _prompt_to_json(prompt: Prompt) -> dict[str, Any]:
    messages = [{**m.extra, "role": m.role, "content": m.content} for m in prompt.messages]
    return {"id": prompt.id, "messages": messages, "fields": dict(prompt.fields), "tools": list(prompt.tools)}


def _prompt_from_json(record: dict[str, Any]) -> Prompt:
    messages = tuple(Message(m.pop("role"), m.pop("content"), m) for m in record["messages"])
    return Prompt(record["id"], messages, record["fields"], tuple(record["tools"]))


def _write_prompts(context: Context, prompts: Iterable[Prompt], length: int, folder: str, split: str) -> None:
    if is_complete(os.path.join(folder, "tokens")):
        return
    longest: list[int] = []

    def kept() -> Iterator[tuple[Prompt, list[int]]]:
        for prompt in prompts:
            tokens = encode_prompt(context.tokenizer, prompt)
            longest.append(len(tokens))
            if len(tokens) <= length:
                yield prompt, tokens

    ids: list[list[int]] = []

    def lines() -> Iterator[dict[str, Any]]:
        for prompt, tokens in kept():
            ids.append(tokens)
            yield _prompt_to_json(prompt)

    Store.write(os.path.join(folder, "prompts.jsonl"), lines())
    if not ids:
        raise UserError(
            f"{context.name}: none of {len(longest):,} {split} prompts fits prompt_length={length}; 99 % of them fit "
            f"{int(np.percentile(longest, 99)) if longest else 0}"
        )
    lengths = np.array([len(tokens) for tokens in ids], np.int32)
    flat = np.array([token for tokens in ids for token in tokens], np.int32)
    block = Block(flat, len(ids), lengths, np.zeros(len(flat), np.int32), {"dropped": len(longest) - len(ids)})
    write_shards(os.path.join(folder, "tokens"), lambda _: [block], vocab_size=context.tokenizer.vocab_size, masked=True)


def draw(prompts: PromptSet, count: int, seed: int, purpose: str) -> list[int]:
    """Numbers of `count` prompts (or all), drawn without replacement in an order of their own for each purpose."""
    order = np.random.default_rng([seed, *purpose.encode()]).permutation(len(prompts))
    return [int(i) for i in order[:count]]


# ---- rankings -----------------------------------------------------------------------------------------------------


def prepare_rankings(context: Context, data: Data, length: int, batch_size: int) -> None:
    """Reads and caches rankings before any stage trains; those that a model makes are only checked."""
    if data.from_model:
        data.prepare(context)
    else:
        check_enough(len(ranking_rows(context, data, length)[0]["train"]), batch_size)


class RankingRows:
    """Rankings, each one row of K answers behind their prompt, padded on the right.

    Rows: tokens, segment_ids, loss_mask [B, K, T] int32 (the mask is on the answer and its end of turn), ranks [B, K] int32,
    -1 where a ranking has fewer answers. scores: [N, K] float64, NaN where they are not known. edited_from: [N, K], the answer
    that one was edited from, else -1. groups: of the prompts [N].
    """

    def __init__(self, folder: str, length: int, pad_id: int, k: int):
        self._shards, self._length, self._pad_id, self.k = Shards(os.path.join(folder, "tokens")), length, pad_id, k
        about = Store(os.path.join(folder, "rankings.jsonl"))
        ends = np.concatenate([[0], np.cumsum(self._shards.lengths())])
        self.ranks, self.scores = np.full((len(about), k), -1, np.int32), np.full((len(about), k), np.nan)
        self.edited_from, self.groups = np.full((len(about), k), -1, np.int32), []
        self._spans = np.zeros((len(about), k, 2), np.int64)
        at = 0
        for row in range(len(about)):
            entry = about[row]
            count = len(entry["ranks"])
            self.ranks[row, :count] = entry["ranks"]
            self.scores[row, : len(entry["scores"])] = entry["scores"]
            self.edited_from[row, : len(entry["edited_from"])] = entry["edited_from"]
            self.groups.append(entry["group"])
            self._spans[row, :count] = np.stack([ends[at : at + count], ends[at + 1 : at + count + 1]], axis=1)
            at += count

    def __len__(self) -> int:
        return len(self.ranks)

    def __getitem__(self, chosen: np.ndarray) -> dict[str, np.ndarray]:
        shape = (len(chosen), self.k, self._length)
        arrays = {"tokens": np.full(shape, self._pad_id, np.int32)}
        arrays |= {name: np.zeros(shape, np.int32) for name in ("segment_ids", "loss_mask")}
        for i, row in enumerate(chosen):
            for answer, (start, stop) in enumerate(self._spans[int(row)]):
                tokens, mask = self._shards.read(int(start), int(stop))
                span = i, answer, slice(0, len(tokens))
                arrays["tokens"][span], arrays["segment_ids"][span], arrays["loss_mask"][span] = tokens, 1, mask
        return arrays | {"ranks": self.ranks[chosen]}


def ranking_rows(context: Context, data: Data, length: int) -> tuple[dict[str, RankingRows], list[str]]:
    """Rows of each split, "train" first, and notes. Answers that make more than `length` tokens with their prompt are left out,
    and rankings of which fewer than two remain. Raises UserError if none is left."""
    check_kind(f"{context.name}.data", data, Ranking)
    folder = context.cache_path("rankings", data, length)

    def make() -> dict[str, Any]:
        found = context.read(data)
        most = 2
        for split, rankings in {"train": found.train, **found.held_out}.items():
            most = max(most, _write_rankings(context, rankings, length, os.path.join(folder, split), split))
        return {"held_out": list(found.held_out), "note": found.note, "k": most}

    about = prepared(context, folder, make)
    splits = ("train", *about["held_out"])
    rows = {s: RankingRows(os.path.join(folder, s), length, context.tokenizer.pad_id, about["k"]) for s in splits}
    shards = Shards(os.path.join(folder, "train", "tokens"))
    counts, others = shards.counts, [len(part) for split, part in rows.items() if split != "train"]
    context.found(data, [
        Source("", "rankings", len(rows["train"]), len(shards), 0, sum(others), dropped=counts["dropped"], note=about["note"])
    ])  # fmt: skip
    notes = [about["note"]] if about["note"] else []
    if counts.get("dropped") or counts.get("answers_dropped"):
        notes.append(
            f"{counts.get('answers_dropped', 0):,} answers of more than length={length} tokens are left out, and "
            f"{counts.get('dropped', 0):,} of {len(rows['train']) + counts.get('dropped', 0):,} rankings"
        )
        context.say(notes[-1])
    return rows, notes


def _write_rankings(context: Context, rankings: Iterable[Ranking], length: int, folder: str, split: str) -> int:
    """Writes the rankings of a split; returns the largest number of answers of one."""
    tokenizer, entries = context.tokenizer, []

    def blocks(skip: int) -> Iterator[Block]:
        """One for each ranking; those that are written already are only entered once more."""
        entries.clear()
        for number, ranking in enumerate(rankings):
            prompt = encode_prompt(tokenizer, ranking.prompt)
            answers = [encode_answer(tokenizer, ranking.prompt, prompt, completion) for completion in ranking.completions]
            kept = [i for i, answer in enumerate(answers) if len(prompt) + len(answer) <= length]
            counts = {"answers_dropped": len(answers) - len(kept), "dropped": int(len(kept) < 2)}
            kept = kept if len(kept) > 1 else []
            if kept:
                scores = [ranking.scores[i] for i in kept] if ranking.scores else []
                place = {answer: number for number, answer in enumerate(kept)} | {-1: -1}
                edited = [place.get(ranking.edited_from[i], -1) for i in kept] if ranking.edited_from else []
                entries.append({
                    "id": ranking.prompt.id, "group": ranking.prompt.group, "ranks": [ranking.ranks[i] for i in kept],
                    "scores": scores, "edited_from": edited,
                })  # fmt: skip
            if number >= skip:
                tokens = [token for i in kept for token in (*prompt, *answers[i])]
                masks = [on for i in kept for on in (*[0] * len(prompt), *[1] * len(answers[i]))]
                lengths = np.array([len(prompt) + len(answers[i]) for i in kept], np.int32)
                yield Block(np.array(tokens, np.int32), 1, lengths, np.array(masks, np.int32), counts)

    shards = write_shards(os.path.join(folder, "tokens"), blocks, vocab_size=tokenizer.vocab_size, masked=True)
    if not len(shards):
        raise UserError(f"{context.name}: no {split} ranking fits length={length}; raise it")
    if not entries:  # the tokens were complete, and the run was stopped before the rest was
        list(blocks(sys.maxsize))
    Store.write(os.path.join(folder, "rankings.jsonl"), iter(entries))
    return max(len(entry["ranks"]) for entry in entries)
