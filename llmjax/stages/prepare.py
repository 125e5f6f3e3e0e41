"""Text -> tokenizer -> packed arrays, once per workdir; what is there and whole is not made again."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable

import numpy as np

from llmjax.data import dialogues
from llmjax.data.builder import WorldSource, open_world, prepare_world
from llmjax.data.chat import encode_chat
from llmjax.data.dialogues import Question
from llmjax.data.packing import Packed, pack_examples, pack_stream
from llmjax.data.sources import Corpus, open_corpus
from llmjax.data.tokenizer import Tokenizer
from llmjax.data.world import make_world
from llmjax.errors import UserError
from llmjax.evals.answers import question_tokens
from llmjax.interop.hf_tokenizer import read_tokenizer
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
    """The tokenizer of a workdir. If there is none yet: that of the Hugging Face folder which the experiment starts from,
    else one trained on the training split of its corpus."""
    directory = os.path.join(workdir, "tokenizer")
    if os.path.isdir(directory):
        return Tokenizer.load(directory)
    if experiment.hf_folder is not None:
        tokenizer = read_tokenizer(experiment.hf_folder)
    else:
        tokenizer = Tokenizer.train(corpus_of(experiment, workdir).train, experiment.tokenizer)
    tokenizer.save(directory)
    return tokenizer


def pretrain_data(run: Run) -> tuple[Packed, Packed]:
    """Documents as packed windows of the pre-training length: training and held-out."""
    length = run.experiment.pretrain.length

    def pack(split: str) -> Packed:
        corpus = corpus_of(run.experiment, run.workdir)
        tokens = _encoded(getattr(corpus, split), run.tokenizer)
        return pack_stream(tokens, length, endoftext_id=run.tokenizer.endoftext_id, pad_id=run.tokenizer.pad_id)

    return tuple(_once(run, f"pretrain-{split}-{length}", lambda s=split: pack(s)) for split in ("train", "validation"))


def sft_data(run: Run) -> tuple[Packed, Packed]:
    """Dialogues as packed windows of the SFT length, with the loss mask on the assistant's tokens."""
    length = run.experiment.sft.length

    def pack(split: str) -> Packed:
        chats = (encode_chat(run.tokenizer, chat["messages"]) for chat in world(run, "dialogues", split))
        return pack_examples(((chat.tokens, chat.loss_mask) for chat in chats), length, pad_id=run.tokenizer.pad_id)

    return tuple(_once(run, f"sft-{split}-{length}", lambda s=split: pack(s)) for split in ("train", "validation"))


def questions(run: Run, split: str, num: int, purpose: str) -> list[Question]:
    """`num` questions of the world, drawn without replacement in an order of their own for each purpose.

    There are enough: see `check_num_questions`.
    """
    source = world(run, "questions", split)
    order = np.random.default_rng([run.experiment.seed, *purpose.encode()]).permutation(len(source))
    return source.__getitems__([int(i) for i in order[:num]])


def all_questions(run: Run, split: str) -> list[Question]:
    """Every question of a split, in the order on disk."""
    source = world(run, "questions", split)
    return source[:]


def check_num_questions(experiment: Experiment) -> None:
    """Raises UserError if a stage asks for more questions than the world has. Reads and writes no file."""
    reward, evaluation = experiment.reward, experiment.evaluation
    wanted = []
    if experiment.sft is not None or experiment.ppo is not None:
        wanted.append(("evaluation.num_questions", evaluation.num_questions, "validation"))
    if reward is not None:
        wanted.append(("reward.num_prompts + reward.num_eval_prompts", reward.num_prompts + reward.num_eval_prompts, "train"))
        wanted.append(("reward.num_eval_prompts", reward.num_eval_prompts, "validation"))
    for name, number, split in wanted:
        there = len(dialogues.questions(make_world(experiment.data.seed), split))
        if number > there:
            raise UserError(f"{name}={number}: the world has {there} {split} questions; ask for that many or fewer")


def check_prompt_length(run: Run) -> None:
    """Raises UserError if some question of the world does not fit the prompt_length of a stage."""
    for name in ("reward", "ppo"):
        cfg = getattr(run.experiment, name)
        if cfg is not None and run.result(name) is None:
            asked = all_questions(run, "train") + all_questions(run, "validation")
            longest = max(len(tokens) for tokens in question_tokens(asked, run.tokenizer))
            if longest > cfg.prompt_length:
                raise UserError(
                    f"{name}.prompt_length={cfg.prompt_length}: the longest question has {longest} tokens; "
                    f"use --config.{name}.prompt_length={longest} or more"
                )


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
