"""Text -> tokenizer -> packed arrays, once per workdir; what is there and whole is not made again."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable

import numpy as np

from llmjax.data.builder import WorldSource, open_world, prepare_world
from llmjax.data.chat import encode_chat
from llmjax.data.dialogues import Question
from llmjax.data.packing import Packed, pack_examples, pack_stream
from llmjax.data.sources import Corpus, open_corpus
from llmjax.data.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.evals.answers import question_prompts
from llmjax.stages.config import Experiment
from llmjax.stages.run import Run

ENCODE_BATCH = 1024


def data_dir(workdir: str) -> str:
    """Where a workdir keeps its data sets."""
    return os.path.join(workdir, "data")


def corpus_of(experiment: Experiment, workdir: str) -> Corpus:
    """The documents to pre-train on, training and held-out."""
    return open_corpus(experiment.data, data_dir(workdir))


def load_tokenizer(experiment: Experiment, workdir: str) -> Tokenizer:
    """The tokenizer of a workdir; trained on the training split of its corpus if there is none yet."""
    directory = os.path.join(workdir, "tokenizer")
    if os.path.isdir(directory):
        return Tokenizer.load(directory)
    tokenizer = Tokenizer.train(corpus_of(experiment, workdir).train, experiment.tokenizer)
    tokenizer.save(directory)
    return tokenizer


def pretrain_data(run: Run) -> tuple[Packed, Packed]:
    """Documents as packed windows of the pre-training length: training and held-out."""
    length = run.experiment.pretrain.length

    def pack(split: str) -> Packed:
        corpus = corpus_of(run.experiment, run.workdir)
        return pack_stream(_encoded(getattr(corpus, split), run.tokenizer), length)

    return tuple(_once(run, f"pretrain-{split}-{length}", lambda s=split: pack(s)) for split in ("train", "validation"))


def sft_data(run: Run) -> tuple[Packed, Packed]:
    """Dialogues as packed windows of the SFT length, with the loss mask on the assistant's tokens."""
    length = run.experiment.sft.length

    def pack(split: str) -> Packed:
        dialogues = world(run, "dialogues", split)
        chats = (encode_chat(run.tokenizer, dialogue["messages"]) for dialogue in dialogues)
        return pack_examples(((chat.tokens, chat.loss_mask) for chat in chats), length)

    return tuple(_once(run, f"sft-{split}-{length}", lambda s=split: pack(s)) for split in ("train", "validation"))


def questions(run: Run, split: str, num: int, purpose: str) -> list[Question]:
    """`num` questions of the world, drawn without replacement in an order of their own for each purpose."""
    source = world(run, "questions", split)
    if num > len(source):
        raise UserError(f"{purpose}: {num} {split} questions wanted, the world has {len(source)}; ask for fewer")
    order = np.random.default_rng([run.experiment.seed, *purpose.encode()]).permutation(len(source))
    return source.__getitems__([int(i) for i in order[:num]])


def all_questions(run: Run, split: str) -> list[Question]:
    """Every question of a split, in the order on disk."""
    source = world(run, "questions", split)
    return source[:]


def check_questions(run: Run) -> None:
    """Raises UserError if the world has too few questions for a stage, or one that does not fit its prompt_length."""
    experiment = run.experiment
    if experiment.sft is not None or experiment.ppo is not None:
        questions(run, "validation", experiment.evaluation.num_questions, "evaluation")
    if experiment.reward is not None:
        questions(run, "train", experiment.reward.num_prompts + experiment.reward.num_eval_prompts, "reward")
        questions(run, "validation", experiment.reward.num_eval_prompts, "reward")
    lengths = [cfg.prompt_length for cfg in (experiment.reward, experiment.ppo) if cfg is not None]
    if lengths:
        question_prompts(all_questions(run, "train") + all_questions(run, "validation"), run.tokenizer, min(lengths))


def world(run: Run, kind: str, split: str) -> WorldSource:
    """The "dialogues" or "questions" of the built-in world, which is made now if it is not there."""
    data = run.experiment.data
    folder = prepare_world(
        data_dir(run.workdir), seed=data.seed, num_documents=data.num_documents, num_dialogues=data.num_dialogues
    )
    return open_world(folder, kind, split)


def _encoded(texts: Iterable[str], tokenizer: Tokenizer) -> Iterable[list[int]]:
    texts = iter(texts)
    while batch := list(itertools.islice(texts, ENCODE_BATCH)):
        yield from tokenizer.encode_batch(batch)


def _once(run: Run, name: str, make: Callable[[], Packed]) -> Packed:
    directory = run.path("data", name)
    if not os.path.isdir(directory):
        make().save(directory)
    return Packed.load(directory, mmap=True)
