"""Text -> tokenizer -> packed arrays, once per workdir; what is there and whole is not made again."""

from __future__ import annotations

import itertools
import os
from typing import Callable, Iterable

from llmjax.config import fingerprint
from llmjax.data.builder import open_world
from llmjax.data.chat import encode_chat
from llmjax.data.packing import Packed, pack_examples, pack_stream
from llmjax.data.sources import open_corpus
from llmjax.data.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.stages.config import Experiment
from llmjax.stages.run import Run

ENCODE_BATCH = 1024


def world_dir(workdir: str) -> str:
    return os.path.join(workdir, "data", "world")


def load_tokenizer(experiment: Experiment, workdir: str) -> Tokenizer:
    """The tokenizer of a workdir; trained on the training split of its corpus if there is none yet."""
    directory = os.path.join(workdir, "tokenizer")
    if os.path.isdir(directory):
        return Tokenizer.load(directory)
    corpus = open_corpus(experiment.data, world_dir(workdir))
    tokenizer = Tokenizer.train(corpus.train, experiment.tokenizer)
    tokenizer.save(directory)
    return tokenizer
