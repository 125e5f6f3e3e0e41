"""llmjax --preview: the first examples of each stage as tokens, with what carries loss set apart. Nothing is trained."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from itertools import groupby

from llmjax.data.tokenizer import Tokenizer
from llmjax.runs.pipeline import open_context, with_own_model
from llmjax.runs.workdir import TOKENIZER
from llmjax.stages.base import Context, Stage
from llmjax.stages.experiment import Experiment
from llmjax.training.metrics import MetricsLog


def preview(experiment: Experiment, workdir: str | None) -> None:
    """Prints what the stages of an experiment will learn from.

    The tokenizer is that of `workdir`, where the data that are prepared are kept too, if that run has one; else one is made,
    and nothing is kept. Raises UserError as reading the data does.
    """
    experiment = with_own_model(experiment)
    if workdir and os.path.isdir(os.path.join(workdir, TOKENIZER)):
        _show(experiment, workdir)
        return
    with tempfile.TemporaryDirectory(prefix="llmjax-preview-") as scratch:
        _show(experiment, scratch)


def _show(experiment: Experiment, workdir: str) -> None:
    shared = open_context(experiment, workdir, MetricsLog("", enabled=False))
    for name, stage in experiment.stages.items():
        for line in _lines(stage, shared.for_stage(name)):
            print(line, flush=True)


def _lines(stage: Stage, context: Context) -> Iterator[str]:
    if type(stage).preview is Stage.preview:
        yield f"\n{context.name}: {type(stage).__name__} has nothing to preview"
        return
    found = stage.preview(context)
    yield f"\n{context.name}: tokens are divided by ·, those that carry loss stand in [[ ]]"
    yield from (f"  {note}" for note in found.notes)
    for where, tokens, mask in found.examples:
        yield f"  {where}, {sum(map(bool, mask))} of {len(tokens)} tokens carry loss"
        yield f"    {marked(context.tokenizer, tokens, mask)}"


def marked(tokenizer: Tokenizer, tokens: Sequence[int], mask: Sequence[int]) -> str:
    """Tokens as text in one line, divided by ·, runs of those that carry loss in [[ ]]."""
    parts = []
    for learnt, group in groupby(zip(tokens, mask, strict=True), key=lambda pair: bool(pair[1])):
        shown = "·".join(_token(tokenizer, token) for token, _ in group)
        parts.append(f"[[{shown}]]" if learnt else shown)
    return "".join(parts)


def _token(tokenizer: Tokenizer, token: int) -> str:
    text = tokenizer.bytes_of(token).decode("utf-8", "replace")
    return text.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
