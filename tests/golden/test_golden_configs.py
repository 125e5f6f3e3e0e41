"""Every experiment, resolved to text, is what it was: a changed default or formula shows here, in words."""

import difflib
import os
import pathlib
from dataclasses import replace

import pytest

from llmjax.config import diff, from_json, load_experiment, to_json
from llmjax.errors import UserError
from llmjax.models.config import ModelConfig
from llmjax.models.stats import active_params, total_params, train_flops_per_token
from llmjax.stages.config import Experiment, Study

REPOSITORY = pathlib.Path(__file__).parents[2]
GOLDEN = pathlib.Path(__file__).parent / "configs"
UPDATE = "LLMJAX_UPDATE_GOLDEN"

MATCHED = ("matched_active", "matched_flops", "matched_total", "granularity", "experts")
ARGS = {
    "quickstart": ("dense", "moe", "test", "test_moe"),
    "pretrain_text": ("bpe", "byte", "test"),
    "dense_vs_moe": ("quickstart", "test", *MATCHED, *(f"{name},test" for name in MATCHED)),
}
FREE = {"sft_from_hf": ("FOLDER", "FOLDER,lora")}  # their argument may be anything
CASES = [(name, arg) for name, args in (ARGS | FREE).items() for arg in args]


def load(name: str, arg: str):
    return load_experiment(f"{REPOSITORY / 'experiments' / name}.py:{arg}")


@pytest.mark.parametrize(("name", "arg"), CASES)
def test_config_is_what_it_was(name, arg):
    golden, text = GOLDEN / f"{name}-{arg}.json", to_json(load(name, arg))
    if os.environ.get(UPDATE):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text, encoding="utf-8")
    known = golden.read_text(encoding="utf-8") if golden.exists() else ""
    changes = difflib.unified_diff(known.splitlines(), text.splitlines(), golden.name, "now", lineterm="", n=2)
    assert text == known, "\n".join([*changes, "", f"if this is meant: {UPDATE}=1 pytest tests/golden"])


@pytest.mark.parametrize(("name", "arg"), CASES)
def test_text_reads_back(name, arg):
    config = load(name, arg)
    assert from_json(type(config), to_json(config)) == config


def test_no_experiment_is_left_out():
    files = {path.stem for path in (REPOSITORY / "experiments").glob("*.py")} - {"__init__"}
    assert files == set(ARGS) | set(FREE)
    assert {path.stem for path in GOLDEN.glob("*.json")} == {f"{name}-{arg}" for name, arg in CASES}


@pytest.mark.parametrize("name", ARGS)
def test_first_argument_is_the_default(name):
    assert load_experiment(f"{REPOSITORY / 'experiments' / name}.py") == load(name, ARGS[name][0])


@pytest.mark.parametrize("name", ARGS)
def test_every_argument_is_in_the_error(name):
    with pytest.raises(UserError, match="unknown argument 'nothing'") as caught:
        load(name, "nothing")
    assert all(word in str(caught.value) for arg in ARGS[name] for word in arg.split(","))


@pytest.mark.parametrize("arg", ["quickstart", "test", "matched_active", "matched_active,test"])
def test_dense_and_moe_differ_in_their_experts_alone(arg):
    study = load("dense_vs_moe", arg)
    assert isinstance(study, Study) and all(isinstance(run, Experiment) for run in study.experiments.values())
    dense, moe = study.experiments["dense"], study.experiments["moe"]
    assert {change.split(":")[0] for change in diff(dense, moe)} <= {"name", "model.moe"}
    assert active_params(moe.model) - active_params(dense.model) == router_params(moe.model)


def router_params(cfg: ModelConfig) -> int:
    return cfg.num_layers * cfg.embed_dim * cfg.moe.num_experts


def matched(name: str, size: str) -> tuple[Experiment, list[Experiment]]:
    """The dense run of a study, and the sparse ones."""
    runs = load("dense_vs_moe", name + size).experiments
    assert all(run.stages() == ("pretrain",) for run in runs.values())
    return runs["dense"], [run for run in runs.values() if run.model.moe is not None]


@pytest.mark.parametrize("size", ["", ",test"])
def test_matched_flops_agree_to_a_percent(size):
    dense, sparse = matched("matched_flops", size)

    def flops(run: Experiment) -> float:
        cfg, model = run.pretrain, replace(run.model, vocab_size=run.tokenizer.vocab_size)
        return cfg.steps * cfg.batch_size * cfg.length * train_flops_per_token(model, cfg.length)

    assert [flops(run) / flops(dense) for run in sparse] == pytest.approx([1.0] * 3, abs=0.01)
    moe, wide, fine = (run.pretrain.steps for run in sparse)
    assert wide < fine < moe < dense.pretrain.steps


@pytest.mark.parametrize("size", ["", ",test"])
def test_matched_total_is_equal_but_for_the_router(size):
    dense, (moe,) = matched("matched_total", size)
    assert total_params(moe.model) - total_params(dense.model) == router_params(moe.model)
    assert dense.pretrain == moe.pretrain


@pytest.mark.parametrize("size", ["", ",test"])
def test_granularity_and_experts_keep_the_active_width(size):
    for name in ("granularity", "experts"):
        dense, sparse = matched(name, size)
        for run in sparse:
            assert active_params(run.model) - active_params(dense.model) == router_params(run.model)
            assert run.pretrain == dense.pretrain
        totals = {total_params(run.model) - router_params(run.model) for run in sparse}
        assert len(totals) == (1 if name == "granularity" else 4)
