"""Every experiment, resolved to text, is what it was: what differs from the defaults shows here, in words."""

import difflib
import os
import pathlib
import typing
from dataclasses import replace

import pytest

from llmjax.config import diff, from_dict, load_experiment, to_dict, to_json, validate
from llmjax.config.io import execute, import_root
from llmjax.errors import UserError
from llmjax.models.config import ModelConfig
from llmjax.models.stats import active_params, total_params, train_flops_per_token
from llmjax.stages.experiment import Experiment, Study

REPOSITORY = pathlib.Path(__file__).parents[2]
GOLDEN = pathlib.Path(__file__).parent / "configs"
UPDATE = "LLMJAX_UPDATE_GOLDEN"
FILES = {path.stem: path for path in sorted((REPOSITORY / "experiments").glob("*.py")) if path.stem != "__init__"}


def arguments(name: str) -> tuple[str, ...]:
    """What an experiment may be given behind its colon; () if that is free."""
    with import_root(FILES[name]):
        hints = typing.get_type_hints(execute(FILES[name]).get_config)
    return typing.get_args(hints["arg"]) if typing.get_origin(hints["arg"]) is typing.Literal else ()


ARGS = {name: arguments(name) for name in FILES}


def cases() -> list[tuple[str, str]]:
    """Experiments with each of their arguments; a free one stands for a folder, and for what its golden files name."""
    found = []
    for name, args in ARGS.items():
        golden = [path.stem.removeprefix(f"{name}-") for path in GOLDEN.glob(f"{name}-*.json")]
        found += [(name, arg) for arg in args or dict.fromkeys(["FOLDER", *sorted(golden)])]
    return found


def load(name: str, arg: str):
    return load_experiment(f"{FILES[name]}:{arg}")


@pytest.mark.parametrize(("name", "arg"), cases())
def test_config_is_what_it_was(name, arg):
    golden, text = GOLDEN / f"{name}-{arg}.json", to_json(load(name, arg), defaults=False)
    if os.environ.get(UPDATE):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text, encoding="utf-8")
    known = golden.read_text(encoding="utf-8") if golden.exists() else ""
    changes = difflib.unified_diff(known.splitlines(), text.splitlines(), golden.name, "now", lineterm="", n=2)
    assert text == known, "\n".join([*changes, "", f"if this is meant: {UPDATE}=1 pytest tests/golden"])


def test_no_golden_file_is_left_over():
    assert {path.stem for path in GOLDEN.glob("*.json")} == {f"{name}-{arg}" for name, arg in cases()}


def test_text_without_functions_reads_back():
    config = load("pretrain_text", "test")
    for defaults in (True, False):
        assert from_dict(Experiment, to_dict(config, defaults)) == config


@pytest.mark.parametrize(("name", "arg"), cases())
def test_it_is_valid(name, arg):
    try:
        validate(load(name, arg))
    except UserError as error:
        assert "path is empty" in str(error)  # those of your own data want to be told where they are


@pytest.mark.parametrize("name", [name for name, args in ARGS.items() if args])
def test_first_argument_is_the_default(name):
    assert load_experiment(str(FILES[name])) == load(name, ARGS[name][0])


@pytest.mark.parametrize("name", [name for name, args in ARGS.items() if args])
def test_every_argument_is_in_the_error(name):
    with pytest.raises(UserError, match="unknown argument 'nothing'") as caught:
        load(name, "nothing")
    assert all(arg in str(caught.value) for arg in ARGS[name])


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
    assert all(list(run.stages) == ["pretrain"] for run in runs.values())
    return runs["dense"], [run for run in runs.values() if run.model.moe is not None]


@pytest.mark.parametrize("size", ["", ",test"])
def test_matched_flops_agree_to_a_percent(size):
    dense, sparse = matched("matched_flops", size)

    def flops(run: Experiment) -> float:
        cfg, model = run.stages["pretrain"], replace(run.model, vocab_size=run.tokenizer.size)
        return cfg.steps * cfg.batch_size * cfg.length * train_flops_per_token(model, cfg.length)

    assert [flops(run) / flops(dense) for run in sparse] == pytest.approx([1.0] * 3, abs=0.01)
    moe, wide, fine = (run.stages["pretrain"].steps for run in sparse)
    assert wide < fine < moe < dense.stages["pretrain"].steps


@pytest.mark.parametrize("size", ["", ",test"])
def test_matched_total_is_equal_but_for_the_router(size):
    dense, (moe,) = matched("matched_total", size)
    assert total_params(moe.model) - total_params(dense.model) == router_params(moe.model)
    assert dense.stages == moe.stages


@pytest.mark.parametrize("size", ["", ",test"])
def test_granularity_and_experts_keep_the_active_width(size):
    for name in ("granularity", "experts"):
        dense, sparse = matched(name, size)
        for run in sparse:
            assert active_params(run.model) - active_params(dense.model) == router_params(run.model)
            assert run.stages == dense.stages
        totals = {total_params(run.model) - router_params(run.model) for run in sparse}
        assert len(totals) == (1 if name == "granularity" else 4)
