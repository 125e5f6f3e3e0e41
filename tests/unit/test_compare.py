"""llmjax.stages.compare: who answers, and what is refused before anything is trained."""

import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.config import load_experiment, validate
from llmjax.data.records import Prompt, user
from llmjax.errors import UserError
from llmjax.evals.answers import answer_prompts
from llmjax.generation.sampling import SamplingConfig
from llmjax.models.spec import init_params
from llmjax.models.transformer import hidden_states, logits, transformer_spec
from llmjax.runs.pipeline import open_context
from llmjax.stages.compare import BestOf, Bot, Compare, Model
from llmjax.training.metrics import MetricsLog


@pytest.fixture(scope="module", name="experiment")
def make_experiment():
    return load_experiment("experiments/quickstart.py:test")


@pytest.fixture(scope="module", name="context")
def make_context(experiment, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return open_context(experiment, str(workdir), MetricsLog("", enabled=False), verbose=False).for_stage("table")


def compare(**rows):
    return Compare(rows={"sft": Model("sft"), **rows}, against="sft", score="correct")


@pytest.mark.parametrize(("change", "words"), [
    ({"against": "ppo"}, "against='ppo' is no row; there is sft, cold, best, bot"),
    ({"knowledge": "base"}, "knowledge='base' is no row"),
    ({"against": "best"}, "against='best': take a Model without a temperature of its own"),
    ({"against": "cold"}, "against='cold': take a Model without"),
    ({"knowledge": "cold"}, "knowledge='cold': take a Model without"),
    ({"knowledge": "bot"}, "knowledge='bot': take a Model without"),
])  # fmt: skip
def test_rows_that_others_are_compared_with(change, words):
    stage = compare(cold=Model("sft", temperature=0.5), best=BestOf("sft", "reward"), bot=Bot(str))
    with pytest.raises(UserError, match=words):
        validate(replace(stage, **change))


def test_a_bot_is_tried_before_anything_is_trained(context):
    compare(bot=Bot(lambda prompt: prompt.text)).prepare(context)
    with pytest.raises(UserError, match=r"the bot length said \d+ to prompt .*; return a text"):
        compare(bot=Bot(length)).prepare(context)
    with pytest.raises(UserError, match="the bot partial said 3 to prompt"):
        compare(bot=Bot(functools.partial(lambda number, prompt: number, 3))).prepare(context)


def length(prompt: Prompt) -> int:
    return len(prompt.text)


def test_a_form_that_makes_prompts_too_long_is_refused_at_once(context):
    compare(base=Model("pretrain", form="{prompt}\n")).prepare(context)
    with pytest.raises(UserError, match=r"table: form='.*' makes prompts of up to \d+ tokens; evaluation.prompt_length=22"):
        compare(base=Model("pretrain", form="word " * 30 + "{prompt}\n")).prepare(context)


def test_kl_of_a_colder_model(context):
    """A model at another temperature than the reference, which is itself: for answers of one token the exact KL is known."""
    cfg, count, cold = context.model, 4096, 0.3
    params = init_params(transformer_spec(cfg), jax.random.key(0))
    prompt, ids = Prompt("a", user("Who?")), context.tokenizer.encode("Who?")

    def kl(temperature):
        return answer_prompts(
            params, [prompt] * count, [ids] * count, jax.random.split(jax.random.key(1), count), cfg=cfg,
            sampling=SamplingConfig(max_new_tokens=1, temperature=temperature), tokenizer=context.tokenizer, stop_ids=(),
            length=8, batch_size=1024, reference=params,
        ).kl  # fmt: skip

    x_BTD, _, _ = hidden_states(params, jnp.array([ids]), cfg)
    logits_V = logits(params, x_BTD, cfg)[0, -1].astype(jnp.float32)
    p_cold, log_cold, log_warm = jax.nn.softmax(logits_V / cold), *map(jax.nn.log_softmax, (logits_V / cold, logits_V))
    expected, found = float(jnp.sum(p_cold * (log_cold - log_warm))), kl(cold)
    assert abs(found.mean() - expected) < 4 * found.std() / math.sqrt(count) < 0.1 * expected
    assert np.abs(kl(1.0)).max() == 0
