"""DPO: the loss of its paper for pairs, all pairs for more answers; and the whole stage from the command line."""

import dataclasses
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from llmjax.commands import chat, train
from llmjax.config import load_experiment, validate
from llmjax.data.tokenizer import Tokenizer, TokenizerConfig
from llmjax.errors import UserError
from llmjax.interop.hf_folder import save_params
from llmjax.models.config import ModelConfig
from llmjax.objectives import preference
from llmjax.objectives.preference import answer_log_probs, dpo_loss, implicit_rewards
from llmjax.results import read_summary
from llmjax.stages.preference import DPO

BETA = 0.3
both = pytest.mark.parametrize("name", tiny.crossed([("dense",)], tiny.MODELS))
loss_of = jax.jit(dpo_loss, static_argnames=("cfg", "beta"))


def ranked(cfg, rows=3, k=2, length=9, seed=0):
    """Prompts of two tokens with answers of different lengths behind them, padded, in a random strict order."""
    batch = tiny.rankings(cfg, rows, k, length, seed)
    lengths = np.maximum(batch["segment_ids"].sum(axis=-1, keepdims=True), 4)
    places = np.arange(length)
    real = places < lengths
    return batch | {
        "segment_ids": real.astype(np.int32), "loss_mask": (real & (places >= 2)).astype(np.int32),
        "ranks": np.argsort(np.random.default_rng(seed).random((rows, k)), axis=1).astype(np.int32),
    }  # fmt: skip


def log_probs(params, batch, cfg):
    """log p of each answer [B, K], from the logits of the full forward pass of each row alone."""
    found = np.zeros(batch["ranks"].shape)
    for i, j in np.ndindex(*found.shape):
        count = int(batch["segment_ids"][i, j].sum())
        tokens = batch["tokens"][i, j, :count]
        logits = tiny.logits(params, tokens[None], cfg)[0].astype(np.float64)
        norm = np.log(np.sum(np.exp(logits), axis=-1))
        found[i, j] = sum(logits[t - 1, tokens[t]] - norm[t - 1] for t in range(2, count))
    return found


@pytest.mark.parametrize("name", tiny.crossed([("dense",)], tiny.MODELS))
def test_pairs_give_the_loss_of_the_paper(name):
    """-log sigmoid(beta (log pi_w - log ref_w) - beta (log pi_l - log ref_l)), eq. 7."""
    cfg = tiny.MODELS[name]
    params, reference, batch = tiny.language_model(cfg, 1), tiny.language_model(cfg, 2), ranked(cfg)
    policy, start = log_probs(params, batch, cfg), log_probs(reference, batch, cfg)
    won, lost = batch["ranks"] == 0, batch["ranks"] == 1
    margin = BETA * ((policy - start)[won] - (policy - start)[lost])
    _, metrics = loss_of(params, reference, batch, cfg=cfg, beta=BETA)
    np.testing.assert_allclose(metrics["loss"], np.mean(np.log1p(np.exp(-margin))), rtol=1e-4)
    np.testing.assert_allclose(metrics["accuracy"], np.mean(margin > 0))
    np.testing.assert_allclose(metrics["chosen_reward"], BETA * np.mean((policy - start)[won]), rtol=1e-4)
    np.testing.assert_allclose(metrics["rejected_reward"], BETA * np.mean((policy - start)[lost]), rtol=1e-4)


def test_more_answers_are_all_their_pairs():
    cfg = tiny.DENSE
    params, reference, batch = tiny.language_model(cfg, 1), tiny.language_model(cfg, 2), ranked(cfg, k=4)
    batch["ranks"][1] = [0, 2, 0, -1]  # a tie, and an answer that is not there
    of_answers = jax.jit(implicit_rewards, static_argnames=("cfg", "beta"))
    rewards = np.asarray(of_answers(params, reference, batch, cfg=cfg, beta=BETA)[0], np.float64)
    losses = []
    for r, ranks in zip(rewards, batch["ranks"]):
        pairs = [(i, j) for i, j in itertools.permutations(range(4), 2) if 0 <= ranks[i] < ranks[j]]
        losses.append(np.mean([math.log1p(math.exp(r[j] - r[i])) for i, j in pairs]))
    _, metrics = loss_of(params, reference, batch, cfg=cfg, beta=BETA)
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)


@both
def test_the_first_loss_is_ln_2_and_a_step_parts_the_answers(name):
    cfg = tiny.MODELS[name]
    params, batch = tiny.language_model(cfg), ranked(cfg)

    def loss(params):
        return dpo_loss(params, reference, batch, cfg, BETA)

    reference = params
    (_, metrics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(metrics["loss"], math.log(2), rtol=1e-6)
    np.testing.assert_allclose([metrics["chosen_reward"], metrics["rejected_reward"]], 0, atol=1e-5)
    moved = jax.tree.map(lambda p, g: p - 0.05 * g, params, grads)
    _, after = loss_of(moved, reference, batch, cfg=cfg, beta=BETA)
    assert after["loss"] < math.log(2) - 1e-3 and after["chosen_reward"] > after["rejected_reward"]


def test_the_reference_has_no_gradient():
    cfg, batch = tiny.DENSE, ranked(tiny.DENSE)
    of_reference = jax.jit(jax.grad(lambda ref: dpo_loss(tiny.language_model(cfg), ref, batch, cfg, BETA)[0]))
    grads = of_reference(tiny.language_model(cfg, 1))
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_stretches_change_neither_value_nor_gradient(monkeypatch):
    cfg = dataclasses.replace(tiny.DENSE, logit_softcap=3.0)
    batch, params = ranked(cfg), tiny.language_model(cfg)
    rows = {name: batch[name].reshape(-1, 9) for name in ("tokens", "segment_ids", "loss_mask")}

    def both_of():
        return jax.jit(jax.value_and_grad(lambda p: jnp.sum(answer_log_probs(p, rows, cfg)[0])))(params)

    whole = both_of()
    monkeypatch.setattr(preference, "CHUNK_LOGITS", 4 * len(rows["tokens"]) * cfg.vocab_size)  # three stretches
    tiny.assert_trees_close(both_of(), whole, 1e-4)

    def text_of(places):
        monkeypatch.setattr(preference, "CHUNK_LOGITS", places * len(rows["tokens"]) * cfg.vocab_size)
        return jax.jit(lambda p: answer_log_probs(p, rows, cfg)[0]).lower(params).as_text()

    assert len(text_of(1)) < 1.02 * len(text_of(3))  # a loop, not copies of its body


# ---- the stage ----------------------------------------------------------------------------------------------------

MODEL = ModelConfig(num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=24, vocab_size=262)


@pytest.fixture(name="flags")
def make_flags(tmp_path, monkeypatch) -> list[str]:
    """experiments/dpo_pairs.py with a tiny model and 24 pairs in which the longer answer is better."""
    monkeypatch.setenv("LLMJAX_KEEP_MEMORY", "0")
    Tokenizer.train((), TokenizerConfig(kind="byte")).save(tmp_path / "tokenizer")
    beside = [str(path) for path in (tmp_path / "tokenizer").iterdir()]
    save_params(tiny.language_model(MODEL), MODEL, "llama", str(tmp_path / "hf"), beside=beside)
    pairs = [{"prompt": f"{i}?", "chosen": "yes, so it is", "rejected": "no"} for i in range(24)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return [
        f"--config=experiments/dpo_pairs.py:{tmp_path / 'hf'}", f"--config.dpo.data.path={tmp_path / 'pairs.jsonl'}",
        "--config.dpo.length=40", "--config.dpo.epochs=3", "--config.dpo.optimizer.warmup_steps=1",
        "--config.dpo.optimizer.learning_rate=0.02", "--config.evaluation.sampling.max_new_tokens=4",
    ]  # fmt: skip


WHOLE, LORA = ["--config.dpo.lora=none"], ["--config.dpo.lora.rank=2"]


@pytest.mark.parametrize("more", [pytest.param(WHOLE, id="whole"), pytest.param(LORA, id="lora", marks=pytest.mark.slow)])
def test_from_the_command_line(flags, more, tmp_path, capsys):
    workdir = tmp_path / "run"
    train.run(["llmjax", *flags, *more, f"--workdir={workdir}"])
    printed = capsys.readouterr().out
    assert "dpo: DPO" not in printed and "Held-out accuracy" in printed and "chance 50.0 %" in printed
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    train_rows = [row for row in rows if row["kind"] == "train"]
    assert train_rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    summary = read_summary(workdir / "dpo")
    assert summary.metric("accuracy") == 1.0 and summary.metric("loss") < 0.6 and summary.metric("kl") > 0
    assert (workdir / "dpo" / "adapter").exists() == ("lora=none" not in more[0])
    chat.run(["llmjax-chat", f"--workdir={workdir}", "--message=hello", "--max_new_tokens=3"])
    train.run(["llmjax", *flags, *more, f"--workdir={workdir}"])
    assert "complete already" in capsys.readouterr().out


def test_preview(flags, capsys):
    train.run(["llmjax", *flags, "--preview"])
    printed = capsys.readouterr().out
    assert " rankings of up to 2 answers to train on" in printed and "[[y·e·s·,· ·s·o· ·i·t· ·i·s·<|end|>]]" in printed


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--config.dpo.beta=0", "dpo: beta=0.0 must be positive"),
        ("--config.dpo.batch_size=0", "dpo: batch_size=0 must be positive"),
        ("--config.dpo.init=sft", "dpo.init='sft' is not an earlier stage of this experiment"),
        ("--config.dpo.lora.rank=0", "rank=0 must be"),
        ("--config.dpo.length=8", "no train ranking fits length=8; raise it"),
    ],
)
def test_what_cannot_work_is_one_line(flags, flag, words, tmp_path):
    with pytest.raises(UserError, match=words) as error:
        train.run(["llmjax", *flags, flag, f"--workdir={tmp_path / 'run'}"])
    assert "\n" not in str(error.value)


def test_behind_another_stage_on_the_answers_of_its_model():
    """Rankings may be made by a ranker of what the policy itself writes; other data are refused."""
    quickstart = load_experiment("experiments/quickstart.py:test")

    def behind_sft(data):
        dpo = DPO(data, init="sft", batch_size=8, length=64)
        stages = {name: quickstart.stages[name] for name in ("pretrain", "sft")} | {"dpo": dpo}
        validate(dataclasses.replace(quickstart, stages=stages))
        return dpo

    made = behind_sft(quickstart.stages["reward"].data)
    assert [link.source for link in made.inputs()] == ["sft", "sft"]
    with pytest.raises(UserError, match="dpo.data is WorldDialogues, of dialogues; rankings are needed"):
        behind_sft(quickstart.stages["sft"].data)
