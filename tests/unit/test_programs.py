"""What a stage is going to compute is known from shapes alone, and it is what training then runs."""

import dataclasses
import json
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import pytest
import tiny

from llmjax.config import load_experiment, validate
from llmjax.data.tokenizer import Tokenizer, TokenizerConfig
from llmjax.models.heads import scalar_model_spec
from llmjax.models.lora import LoRAConfig
from llmjax.models.spec import init_params
from llmjax.models.stats import total_params
from llmjax.rl.algorithms import GRPO
from llmjax.rl.learner import Learner
from llmjax.runs.pipeline import open_context
from llmjax.sharding import MeshConfig, make_mesh, put_batch, use_mesh
from llmjax.stages import base
from llmjax.stages.base import Context
from llmjax.stages.experiment import Experiment
from llmjax.training.checkpoint import Checkpoints, save_params
from llmjax.training.metrics import MetricsLog

QUICKSTART = pathlib.Path(__file__).parents[2] / "experiments" / "quickstart.py"
STAGES = ("pretrain", "sft", "reward", "ppo")
NAMES = {stage: ("update",) for stage in STAGES} | {"ppo": ("sample", "score", "update")}


class Enough(Exception):
    """A test has seen what it wanted to see."""


def context_of(experiment: Experiment, mesh=None) -> Context:
    """As a stage sees it, in a workdir that does not exist and with a tokenizer that was learnt from nothing."""
    tokenizer = Tokenizer.train((), TokenizerConfig(kind="byte"))
    model = dataclasses.replace(experiment.model, vocab_size=tokenizer.vocab_size)
    return Context(experiment, "", "/no/such/workdir", mesh, model, tokenizer, MetricsLog("", enabled=False), verbose=False)


def programs_of(context: Context, name: str):
    return context.experiment.stages[name].programs(context.for_stage(name))


@pytest.fixture(name="nothing_is_made")
def forbid_weights_and_data(monkeypatch):
    """Reading data, loading a model and drawing parameters fail."""

    def forbidden(*args, **options):
        pytest.fail("programs need neither weights nor data")

    for name in ("read", "load_lm", "load"):
        monkeypatch.setattr(Context, name, forbidden)
    forbid_drawing(monkeypatch, forbidden)


def forbid_drawing(monkeypatch, forbidden) -> None:
    """`init_params`, wherever it was imported."""
    load_experiment(f"{QUICKSTART}:test")  # what is imported later would keep the wrong one
    for name, module in list(sys.modules.items()):
        if name.startswith("llmjax.") and getattr(module, "init_params", None) is init_params:
            monkeypatch.setattr(module, "init_params", forbidden)


VARIANTS = (*(f"{arg}-{stage}" for arg in ("test", "test_moe") for stage in STAGES), "lora-sft", "grpo-ppo")


def variant(kind: str) -> tuple[Experiment, str]:
    """An experiment, and the stage of it that is looked at."""
    arg, _, stage = kind.partition("-")
    experiment = load_experiment(f"{QUICKSTART}:{arg if arg.startswith('test') else 'test'}")
    if arg == "lora":
        experiment = experiment.with_stage("sft", lora=LoRAConfig(rank=2))
    if arg == "grpo":
        experiment = experiment.with_stage("ppo", algorithm=GRPO(group_size=4), critic="", critic_warmup=0)
    return experiment, stage


@pytest.mark.parametrize("kind", VARIANTS)
def test_programs_are_made_of_shapes_alone(nothing_is_made, kind):
    experiment, stage = variant(kind)
    validate(experiment)
    context = context_of(experiment)
    before = {id(array) for array in jax.live_arrays()}
    programs = programs_of(context, stage)
    lowered = {name: program.lower() for name, program in programs.items()}
    allocated = sum(array.size for array in jax.live_arrays() if id(array) not in before)
    assert allocated < total_params(context.model) / 10
    assert tuple(lowered) == NAMES[stage] and not pathlib.Path(context.workdir).exists()
    for name, program in programs.items():
        assert program.tokens > 0 and program.flops_per_token > 0, name
        made = jax.tree.leaves(lowered[name].out_info)
        assert made and all(leaf.shape is not None for leaf in made)
    update = programs["update"]
    state, metrics = lowered["update"].out_info
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), update.state)
    assert {"loss", "grad_norm"} <= set(metrics)


@pytest.mark.parametrize("stage", STAGES)
def test_programs_for_a_mesh(nothing_is_made, stage):
    """Lowered for eight devices, with every part of the state where it is to lie."""
    experiment = load_experiment(f"{QUICKSTART}:test")
    experiment = experiment.with_stage("ppo", minibatches=1)
    experiment = dataclasses.replace(experiment, mesh=MeshConfig(data=2, fsdp=4))
    validate(experiment)
    mesh = make_mesh(experiment.mesh)
    with use_mesh(mesh):
        update = programs_of(context_of(experiment, mesh), stage)["update"]
        lowered = update.lower()
    assert "num_partitions = 8" in lowered.as_text()
    state, batch, *_ = update.args
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves((state, batch)))
    rows = {leaf.shape[0] for leaf in jax.tree.leaves(batch)}
    assert {leaf.sharding.shard_shape(leaf.shape)[0] for leaf in jax.tree.leaves(batch)} == {n // 8 for n in rows}
    largest = max(jax.tree.leaves(state.params), key=lambda leaf: leaf.size)
    assert largest.size == 4 * jnp.prod(jnp.array(largest.sharding.shard_shape(largest.shape)))


def test_what_follows_from_a_config_is_in_its_numbers():
    context = context_of(load_experiment(f"{QUICKSTART}:test"))
    stages = context.experiment.stages
    update = programs_of(context, "pretrain")["update"]
    assert update.tokens == stages["pretrain"].batch_size * stages["pretrain"].length == 8 * 64
    assert {name: leaf.shape for name, leaf in update.args[1].items()} == dict.fromkeys(
        ("inputs", "targets", "segment_ids", "positions", "loss_mask"), (8, 64)
    )
    ranked = stages["reward"].update(context.for_stage("reward"), k=3, steps=7)
    assert ranked.args[1]["tokens"].shape == (8, 3, 46) and ranked.args[1]["ranks"].shape == (8, 3)
    ppo = programs_of(context, "ppo")
    assert ppo["sample"].tokens == 8 * (22 + 24) == stages["ppo"].minibatches * ppo["update"].tokens


# ---- beside training ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", name="context")
def make_context(tmp_path_factory) -> Context:
    """The test-sized quickstart in a workdir with an untrained model of every stage, and rankings to train on."""
    experiment = load_experiment(f"{QUICKSTART}:test")
    workdir = tmp_path_factory.mktemp("run")
    context = open_context(experiment, str(workdir), MetricsLog("", enabled=False), verbose=False)
    for number, name in enumerate(("pretrain", "sft")):
        save_params(str(workdir / name / "params"), tiny.language_model(context.model, number))
    save_params(str(workdir / "reward" / "params"), tiny.draw(scalar_model_spec(context.model), 2))
    for split, count in (("train", 16), ("held_out", 8), ("new_prompts", 8)):
        lines = [
            json.dumps({
                "id": f"{split} {i}", "prompt": [{"role": "user", "content": f"{i} + 1?"}], "ranks": [0, 1, 2, 3],
                "answers": [{"text": "so" * (n + 1), "tokens": [], "ended": True} for n in range(4)],
                "scores": [4.0, 3.0, 2.0, 1.0], "fields": {},
            }) for i in range(count)
        ]  # fmt: skip
        (workdir / "reward" / f"rankings-{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return context


def hlo(lowered) -> str:
    """The text of a program, without annotations that say that something lies on no mesh."""
    return re.sub(r" \{sdy\.sharding = #sdy\.sharding<@empty_mesh, [^>]*>\}", "", lowered.as_text())


class Watched:
    """A compiled function that keeps what it was lowered to."""

    def __init__(self, fn, name, texts):
        self.fn, self.name, self.texts = fn, name, texts

    def __call__(self, *args):
        lowered = self.fn.lower(*args)
        self.texts[self.name] = hlo(lowered)
        return lowered.compile()(*args)


@pytest.mark.parametrize("name", STAGES)
def test_training_runs_the_very_program(context, monkeypatch, name):
    """To the letter of its HLO: what is compiled ahead of time, timed and planned with is what is trained with."""
    stage, own, texts = context.experiment.stages[name], context.for_stage(name), {}
    fit, programs = Context.fit, Learner.programs

    def watched(name, program):
        return dataclasses.replace(program, fn=Watched(program.fn, name, texts))

    def one_step(loop, start_state, abstract, step_fn, batches):
        step_fn(start_state(), put_batch(batches[0], loop.mesh), jax.random.fold_in(loop.key, 0))
        raise Enough

    def all_watched(learner):
        made = programs(learner)
        return made._replace(**{name: watched(name, one) for name, one in made._asdict().items()})

    with monkeypatch.context() as patch:
        if name == "ppo":
            patch.setattr(Learner, "programs", all_watched)
        else:
            patch.setattr(Context, "fit", lambda self, program, *args, **kw: fit(self, watched("update", program), *args, **kw))
        patch.setattr(base, "train", one_step)
        with pytest.raises(Enough):
            stage.run(own)
    # A reward model learns from its data how many steps there are to be: here two, of eight rankings each.
    plan = {"update": stage.update(own, k=4, steps=2)} if name == "reward" else stage.programs(own)
    assert set(texts) == set(plan) == set(NAMES[name])
    for key, program in plan.items():
        assert hlo(program.lower()) == texts[key], key


LOADED = {"pretrain": [], "sft": [], "lora": ["pretrain"], "reward": [], "ppo": ["sft", "reward"]}


@pytest.mark.parametrize("kind", LOADED)
def test_a_resumed_stage_makes_no_weights_to_start_from(context, monkeypatch, tmp_path, kind):
    """It loads what stays frozen beside what is trained, and nothing else: a model may fit the device once, not twice."""
    name = "sft" if kind == "lora" else kind
    experiment = context.experiment.with_stage("sft", lora=LoRAConfig(rank=2)) if kind == "lora" else context.experiment
    stage, own = experiment.stages[name], dataclasses.replace(context, experiment=experiment, name=name)
    steps = 2 if name == "reward" else stage.steps
    loaded, fit = [], Context.fit

    def note(function):
        return lambda self, source, *args: loaded.append(source) or function(self, source, *args)

    def resumed(self, program, start, batches, num_steps, **options):
        assert num_steps == steps
        checkpoints = Checkpoints(str(tmp_path / "checkpoints"))
        state = program.init(tiny.draw(program.specs, 7)).replace(step=jnp.int32(num_steps))
        expected = jax.device_get(state.params)
        checkpoints.save(num_steps, state)
        checkpoints.close()
        trained = fit(self, program, start, batches, num_steps, **options)
        tiny.assert_trees_equal(trained.params, expected)
        raise Enough

    monkeypatch.setattr(Context, "load_lm", note(Context.load_lm))
    monkeypatch.setattr(Context, "load", note(Context.load))
    forbid_drawing(monkeypatch, lambda *args: pytest.fail("parameters were drawn"))
    monkeypatch.setattr(Context, "fit", resumed)
    monkeypatch.setattr(Context, "path", lambda self, *parts: str(tmp_path.joinpath(*parts)))
    if name == "reward":
        rankings = pathlib.Path(context.workdir) / "reward"
        for file in rankings.glob("rankings-*.jsonl"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(Enough):
        stage.run(own)
    # A language model is loaded by `load_lm`, which calls `load`.
    assert list(dict.fromkeys(loaded)) == LOADED[kind]
    assert len(loaded) == len(LOADED[kind]) + len([one for one in LOADED[kind] if one != "reward"])
