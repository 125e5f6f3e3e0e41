"""Every experiment, resolved to text, is what it was: a changed default or formula shows here, in words."""

import difflib
import os
import pathlib

import pytest

from llmjax.config import diff, from_json, load_experiment, to_json
from llmjax.errors import UserError
from llmjax.models.stats import active_params
from llmjax.stages.config import Experiment, Study

REPOSITORY = pathlib.Path(__file__).parents[2]
GOLDEN = pathlib.Path(__file__).parent / "configs"
UPDATE = "LLMJAX_UPDATE_GOLDEN"

ARGS = {
    "quickstart": ("dense", "moe", "test", "test_moe"),
    "pretrain_text": ("bpe", "byte", "test"),
    "dense_vs_moe": ("quickstart", "test"),
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
    assert all(arg in str(caught.value) for arg in ARGS[name])


@pytest.mark.parametrize("arg", ARGS["dense_vs_moe"])
def test_dense_and_moe_differ_in_their_experts_alone(arg):
    study = load("dense_vs_moe", arg)
    assert isinstance(study, Study) and all(isinstance(run, Experiment) for run in study.experiments.values())
    dense, moe = study.experiments["dense"], study.experiments["moe"]
    assert {change.split(":")[0] for change in diff(dense, moe)} == {"name", "model.moe"}
    router = moe.model.num_layers * moe.model.embed_dim * moe.model.moe.num_experts
    assert active_params(moe.model) - active_params(dense.model) == router
