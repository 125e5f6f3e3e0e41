"""The command line: every mistake is one line on stderr and exit status 2, and leaves nothing behind."""

import errno
import gzip
import json
import os
import pathlib
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import tiny

from llmjax.commands import base, train
from llmjax.config import apply_overrides, load_experiment, to_dict, to_json
from llmjax.data.base import Mixture
from llmjax.data.sources import Dialogues, Rankings
from llmjax.data.tokenizer import Tokenizer, TokenizerConfig
from llmjax.errors import UserError
from llmjax.interop.hf_folder import save_params
from llmjax.models.config import ModelConfig
from llmjax.report import read, render
from llmjax.runs import pipeline
from llmjax.runs import workdir as workdir_module
from llmjax.training.metrics import MetricsLog

REPOSITORY = pathlib.Path(__file__).parents[2]
EXPERIMENTS = REPOSITORY / "experiments"
QUICKSTART = f"--config={EXPERIMENTS / 'quickstart.py'}"
TEXT = f"--config={EXPERIMENTS / 'pretrain_text.py'}:test"
STUDY = f"--config={EXPERIMENTS / 'dense_vs_moe.py'}:test"


ROPE = ["--config.model.rope_scaling.factor=2", "--config.model.rope_scaling.original_length=64"]


@pytest.fixture(autouse=True)
def _leave_this_process_alone(monkeypatch):
    monkeypatch.setenv("LLMJAX_KEEP_MEMORY", "0")


def error_of(capsys, *flags: str) -> str:
    """The one line that the program ends with, its name taken off."""
    with pytest.raises(SystemExit) as ended:
        base.call(train.run, ["/somewhere/llmjax", *map(str, flags)])
    captured = capsys.readouterr()
    assert ended.value.code == 2
    assert captured.out == ""
    assert captured.err.startswith("llmjax: ") and captured.err.endswith("\n") and captured.err.count("\n") == 1
    return captured.err.removeprefix("llmjax: ").rstrip("\n")


def tree(folder: pathlib.Path) -> dict[str, tuple[int, bytes]]:
    """Everything below `folder`: times and contents."""
    paths = (path for path in folder.rglob("*"))
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p in paths}


@pytest.fixture()
def workdir(tmp_path) -> pathlib.Path:
    """Where a run would write; a test that asks for it fails if anything is there in the end."""
    path = tmp_path / "runs" / "one"
    yield path
    assert not path.parent.exists()


# ---- flags ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flags", "message"), [
    (["--workdri=x"], "Unknown command line flag 'workdri'. Did you mean: workdir ?; --help lists the flags"),
    (["--cpu_devices=two"], "flag --cpu_devices=two:"),
    (["--cpu_devices=-1"], "--cpu_devices=-1 must be positive"),
    (["quickstart"], "unexpected argument 'quickstart'; flags are written --name=value"),
    (["--config.seed"], "--config.seed: no value; write --config.seed=VALUE"),
    (["--config.seed=x"], "--config.seed=x: expected int; for example --config.seed=8"),
    (["--config.sede=1"], "--config.sede=1: no field 'sede' in Experiment; did you mean 'seed'?"),
    (["--config.pretrain.optimizer.learningrate=1"],
     "no field 'learningrate' in OptimizerConfig; did you mean 'learning_rate'?"),
    (["--config.pretrain.steps=many"], "--config.pretrain.steps=many: expected int"),
    (["--config.pretrain.steps=0"], "pretrain: steps=0 must be positive"),
    (["--config.dpo.steps=1"], "--config.dpo.steps=1: no field 'dpo' in Experiment; did you mean 'ppo'?"),
    (["--config.pretrain=none"], "sft.init='pretrain' is not an earlier stage of this experiment; there is none"),
    (["--config.reward=none"],
     "ppo.critic='reward' is not an earlier stage of this experiment; there is pretrain, sft"),
    (["--config.ppo.critic=sft"], "ppo.critic='sft' makes a language model; a scalar model is needed"),
    (["--config.ppo.algorithm.kl_coef=-1"], "ppo.algorithm: kl_coef=-1.0 must be 0 or more"),
    (["--config.ppo.algorithm=GRPO"], "ppo: critic='reward': GRPO has no critic; leave it out"),
    (["--config.model.moe.top_k=9"], "model.moe: top_k=9 must not exceed num_experts=8"),
    (["--config.model.num_heads=3"], "model: num_heads=3 is not a multiple of num_kv_heads=2"),
    (["--config.mesh.data=3", "--config.evaluation.batch_size=3", "--config.pretrain.batch_size=32"],
     "pretrain.batch_size=32 is not divisible by the 3 batch shards of the mesh (data=3); use pretrain.batch_size=33"),
    (["--config.ppo.batch_size=12", "--config.ppo.minibatches=2", "--config.mesh.data=4"],
     "ppo: batch_size=12 in minibatches=2 is 6 answers each, which the 4 batch shards of the mesh (data=4) cannot share; use "
     "ppo.batch_size=16, or other ppo.minibatches"),
    (["--config.mesh.tensor=4"], "has kv_heads=2, which the mesh axes tensor split into 4 unequal parts"),
    (["--config.mesh.tensor=16"], "mesh: tensor=16 needs 16 devices, 8 found"),
    (["--config.mesh.expert=4", "--config.model.moe.num_experts=6"], "mesh.expert=4 does not divide"),
    (["--config.tokenizer.vocab_size=100"], "tokenizer: vocab_size=100 is less than 262"),
    (["--config.model.vocab_size=300", "--config.tokenizer.vocab_size=1000"],
     "model.vocab_size=300 is less than the tokenizer's 1000 tokens; raise it, or 0 for as many as there are"),
    (["--config.model.vocab_size=261", "--config.tokenizer.kind=byte"],
     "model.vocab_size=261 is less than the tokenizer's 262 tokens"),
    ([*ROPE, "--config.pretrain.length=129"],
     "pretrain.length=129 is more than the 128 that the model is made for (model.rope_scaling.factor * "),
    ([*ROPE, "--config.reward.data.prompt_length=100", "--config.reward.data.sampling.max_new_tokens=29"],
     "reward.data.prompt_length + max_new_tokens=129 is more than the 128 that"),
    ([*ROPE, "--config.ppo.prompt_length=100", "--config.ppo.max_new_tokens=29"],
     "ppo.prompt_length + max_new_tokens=129 is more than the 128 that"),
])  # fmt: skip
def test_wrong_flags(capsys, workdir, flags, message):
    assert message in error_of(capsys, QUICKSTART, f"--workdir={workdir}", *flags)


@pytest.mark.parametrize(("most", "message"), [
    (95, "sft.length=96 is more than the 95 that the model is made for (max_position_embeddings of "),
    (383, "evaluation.prompt_length + max_new_tokens=384 is more than the 383 that"),
])  # fmt: skip
def test_longer_than_a_folders_model(capsys, workdir, tmp_path, most, message):
    folder = hf_model(tmp_path / "hf", {"max_position_embeddings": most})
    (tmp_path / "a.jsonl").write_text('{"prompt": "Hi", "completion": "Ho"}\n')
    sft = f"--config={EXPERIMENTS / 'sft_dialogues.py'}:{folder}"
    flags = [f"--config.sft.data.path={tmp_path / 'a.jsonl'}", "--config.sft.length=96"]
    flags += ["--config.evaluation.prompt_length=256", "--config.evaluation.sampling.max_new_tokens=128"]
    assert message in error_of(capsys, sft, f"--workdir={workdir}", *flags)


def hf_model(folder, source):
    """A tiny model with its tokenizer; source: what config.json says beside its shape."""
    tokenizer = Tokenizer.train([], TokenizerConfig(kind="byte"))
    cfg = ModelConfig(vocab_size=tokenizer.vocab_size, num_layers=1, embed_dim=8, num_heads=1, num_kv_heads=1, head_dim=8,
                      mlp_dim=8)  # fmt: skip
    save_params(tiny.language_model(cfg), cfg, "llama", str(folder), source=source)
    tokenizer.save(folder.parent / "tokenizer")
    for path in (folder.parent / "tokenizer").iterdir():
        path.rename(folder / path.name)
    return folder


@pytest.mark.parametrize("tokens", [300, 1000])
def test_a_workdirs_tokenizer_that_the_model_cannot_hold(tmp_path, tokens):
    """One of another run, which somebody has put there."""
    cfg = replace(load_experiment(f"{EXPERIMENTS / 'pretrain_text.py'}:test"), model=ModelConfig(vocab_size=320))
    words = [f"{a}{b}{c}" for a in "abcdefghij" for b in "klmnopqrst" for c in "uvwxyz"] * 3
    made = Tokenizer.train([" ".join(words)], TokenizerConfig(vocab_size=tokens))
    made.save(tmp_path / "run" / "tokenizer")
    if tokens == 300:
        assert pipeline.open_context(cfg, str(tmp_path / "run"), MetricsLog("", enabled=False)).model.vocab_size == 320
        return
    with pytest.raises(UserError, match=f"model.vocab_size=320 is less than the tokenizer's {made.vocab_size} tokens"):
        pipeline.open_context(cfg, str(tmp_path / "run"), MetricsLog("", enabled=False))


def test_missing_flags(capsys):
    assert error_of(capsys).startswith("--config is missing; give an experiment file")
    assert error_of(capsys, QUICKSTART).startswith("--workdir is missing; give a folder for this run")


@pytest.mark.parametrize(("config", "message"), [
    (f"{EXPERIMENTS}/quickstrt.py", "did you mean"),
    (f"{EXPERIMENTS}/quickstart.py:mo", "unknown argument 'mo'; did you mean 'moe'?"),
    (f"{EXPERIMENTS}/dense_vs_moe.py:tset", "unknown argument 'tset'"),
    (f"{EXPERIMENTS}/__init__.py", "has no function get_config"),
])  # fmt: skip
def test_wrong_experiment(capsys, workdir, config, message):
    assert message in error_of(capsys, f"--config={config}", f"--workdir={workdir}")


def test_experiment_without_a_stage(capsys, workdir, tmp_path):
    file = tmp_path / "nothing.py"
    file.write_text("from llmjax.stages.experiment import Experiment\ndef get_config(): return Experiment('nothing')\n")
    line = error_of(capsys, f"--config={file}", f"--workdir={workdir}")
    assert line == "no stage: give at least one"


# ---- data -------------------------------------------------------------------------------------------------------


def text_error(capsys, workdir, *flags: str) -> str:
    return error_of(capsys, TEXT, f"--workdir={workdir}", *flags)


def test_no_path(capsys, workdir):
    assert text_error(capsys, workdir).startswith("pretrain.data: path is empty")


def test_missing_file(capsys, workdir, tmp_path):
    path = tmp_path / "no" / "*.txt"
    assert text_error(capsys, workdir, f"--config.pretrain.data.path={path}") == (
        f"path={path} matches no file; there is no folder {path.parent}"
    )


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_empty_corpus(capsys, workdir, tmp_path, name):
    path = tmp_path / name
    path.write_text("\n \n")
    assert text_error(capsys, workdir, f"--config.pretrain.data.path={path}").startswith(f"path={path}: the corpus is empty")


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_corrupt_jsonl_line(capsys, workdir, tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    with (gzip.open if suffix.endswith("gz") else open)(path, "wt") as file:
        file.write('{"text": "one"}\n{"text": "two"\n{"text": "three"}\n')
    line = text_error(capsys, workdir, f"--config.pretrain.data.path={path}")
    assert line.startswith(f"{path}:2: not JSON (") and line.endswith("mend or remove the line")


def test_other_field_of_jsonl(capsys, workdir, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"txt": "one"}\n')
    line = text_error(capsys, workdir, f"--config.pretrain.data.path={path}")
    assert line.startswith(f"{path}:1: no field 'text'; did you mean 'txt'?")


def test_unknown_suffix(capsys, workdir, tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("a,b\n")
    assert f"{path}: unknown suffix" in text_error(capsys, workdir, f"--config.pretrain.data.path={path}")


def test_unknown_tfds_name(capsys, workdir):
    line = text_error(capsys, workdir, "--config.pretrain.data.name=imdb_reviewz")
    assert line.startswith("name=imdb_reviewz: TFDS has no such data set") and "did you mean 'imdb_reviews'?" in line


def test_data_of_another_kind(capsys, workdir):
    line = error_of(capsys, f"{QUICKSTART}:test", f"--workdir={workdir}", "--config.sft.data=WorldText")
    assert line.endswith("sft.data is WorldText, of documents; dialogues are needed")


def test_the_data_of_every_stage_are_read_before_anything_is_written(capsys, workdir, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    flags = ["--config.sft.data=Dialogues", f"--config.sft.data.path={path}"]
    line = error_of(capsys, f"{QUICKSTART}:test", f"--workdir={workdir}", *flags)
    assert line == f"{path}:1: no message of the assistant, so there is nothing to learn"


def test_an_error_leaves_what_another_run_has_made_beside_it(tmp_path, monkeypatch):
    """Both may have found no folder runs/ when they began."""
    other = tmp_path / "runs" / "other" / "config.json"

    def read(self, place):
        other.parent.mkdir(parents=True)
        other.write_text("{}")
        pathlib.Path(place.data_path("half")).mkdir(parents=True)
        raise UserError("a.txt:1: broken")

    experiment = load_experiment(f"{EXPERIMENTS}/quickstart.py:test")
    monkeypatch.setattr(type(experiment.text), "read", read)
    with pytest.raises(UserError, match="a.txt:1: broken"):
        pipeline.read_data(experiment, str(tmp_path / "runs" / "mine"))
    assert other.exists() and not (tmp_path / "runs" / "mine").exists()


# ---- workdir ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [f"{QUICKSTART}:test", STUDY], ids=["experiment", "study"])
@pytest.mark.parametrize("below", ["", "runs/one"])
def test_workdir_is_a_file(capsys, tmp_path, config, below):
    file = tmp_path / "file"
    file.write_text("text")
    before = tree(tmp_path)
    line = error_of(capsys, config, f"--workdir={file / below}")
    assert line.startswith(f"--workdir={file / below}") and f"{file} is a file, not a folder" in line
    assert tree(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_workdir_without_permission(capsys, tmp_path):
    tmp_path.chmod(0o500)
    try:
        line = error_of(capsys, f"{QUICKSTART}:test", f"--workdir={tmp_path / 'a'}")
        assert f"{tmp_path} cannot be written to" in line
    finally:
        tmp_path.chmod(0o700)


def test_workdir_of_another_config(capsys, tmp_path):
    (tmp_path / "config.json").write_text(to_json(load_experiment(f"{EXPERIMENTS}/quickstart.py:test")))
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "ppo").mkdir()
    before = tree(tmp_path)
    flags = ["--config.seed=1", "--config.ppo.policy=pretrain", "--config.pretrain.data.seed=2", "--config.sft.steps=9"]
    assert error_of(capsys, f"{QUICKSTART}:test", f"--workdir={tmp_path}", *flags) == (
        f"--workdir={tmp_path} was made by another config (seed: 0 -> 1; pretrain.data.seed: 0 -> 2; ppo.policy: sft -> "
        "pretrain); use another --workdir, or delete this one to start again, or add --allow_config_change to go on with the "
        "new one, which is written down"
    )
    assert tree(tmp_path) == before


@pytest.fixture(name="begun")
def make_begun(tmp_path):
    """The workdir of a run that has completed pre-training and begun SFT, and its experiment."""
    experiment = load_experiment(f"{EXPERIMENTS}/quickstart.py:test")
    workdir = tmp_path / "begun"
    for step in ("2", "3"):
        (workdir / "sft" / "checkpoints" / step).mkdir(parents=True)
    (workdir / "pretrain").mkdir()
    (workdir / "pretrain" / "result.json").write_text("{}")
    (workdir / "config.json").write_text(to_json(experiment))
    return workdir, experiment


FREE = [
    ("name", "other"), ("mesh.data", "2"), ("checkpoint_seconds", "1"), ("checkpoint_digests", "false"),
    ("evaluation.num_samples", "9"), ("pretrain.eval_every", "5"), ("sft.eval_every", "7"),  # what is shown, and when
    ("ppo.algorithm.kl_coef", "0.123"), ("reward.batch_size", "4"),  # of stages that have not begun
    ("ppo", "none"),
]  # fmt: skip


@pytest.mark.parametrize("override", FREE, ids=lambda one: one[0])
def test_what_changes_nothing_that_was_computed_may_change(begun, override):
    workdir, experiment = begun
    before, changed = tree(workdir), apply_overrides(experiment, [override])
    pipeline.check(changed, str(workdir))
    assert tree(workdir) == before
    (line,) = workdir_module.config_changes(changed, str(workdir))
    assert line.startswith(f"{override[0]}: ")
    assert to_dict(workdir_module.with_prepared_data(changed, str(workdir))) == to_dict(changed)


def test_a_stage_that_has_begun_may_be_taken_out(begun):
    workdir, experiment = begun
    pipeline.check(experiment.only("pretrain"), str(workdir))


@pytest.mark.parametrize("override", [
    ("sft.steps", "123"), ("sft.optimizer.learning_rate", "1"), ("sft.eval_batches", "1"), ("sft.data.num_dialogues", "100"),
    ("seed", "1"), ("model.num_layers", "1"), ("evaluation.num_prompts", "8"), ("tokenizer.vocab_size", "300"),
], ids=lambda one: one[0])  # fmt: skip
def test_what_changes_the_rest_of_a_run_needs_a_flag(begun, override):
    workdir, experiment = begun
    before, changed = tree(workdir), apply_overrides(experiment, [override])
    with pytest.raises(UserError, match=r"was made by another config .* add --allow_config_change to go on with the new one"):
        pipeline.check(changed, str(workdir))
    pipeline.check(changed, str(workdir), allow_config_change=True)
    assert tree(workdir) == before


def test_a_complete_stage_is_not_changed_by_the_flag_either(begun):
    workdir, experiment = begun
    changed = apply_overrides(experiment, [("pretrain.steps", "9")])
    with pytest.raises(UserError, match=r"pretrain\.steps: 6 -> 9\); use another --workdir, or delete this one to start a.*n$"):
        pipeline.check(changed, str(workdir))
    with pytest.raises(UserError, match=r"pretrain\.steps: 6 -> 9, but that stage is complete and is not run again"):
        pipeline.check(changed, str(workdir), allow_config_change=True)


def test_changes_are_written_down(begun):
    workdir, experiment = begun
    for changes in (["sft.steps: 4 -> 9", "seed: 0 -> 1"], [], ["sft.eval_every: 2 -> 3"]):
        workdir_module.record_changes(experiment, str(workdir), changes)
    rows = [json.loads(line) for line in (workdir / "config_changes.jsonl").read_text().splitlines()]
    assert rows == [
        {"stage": "sft", "step": 3, "changes": ["sft.steps: 4 -> 9", "seed: 0 -> 1"]},
        {"stage": "sft", "step": 3, "changes": ["sft.eval_every: 2 -> 3"]},
    ]
    (workdir / "pretrain" / "result.json").unlink()
    changes = read.read_run(workdir).changes
    assert changes[0] == ("sft", 3, "sft.steps: 4 -> 9") and len(changes) == 3
    page = render.write_report(workdir, "x").read_text()
    assert "Config changed since the run began" in page and "after step 3 of sft: sft.steps: 4 -&gt; 9" in page


def test_data_that_were_moved_are_gone_on_with_as_they_were_prepared(begun):
    workdir, experiment = begun
    sources = {"a": Dialogues("old/*.jsonl"), "b": Dialogues("b.jsonl", validation_path="c.jsonl")}
    experiment = experiment.with_stage("sft", data=Mixture(sources))
    (workdir / "config.json").write_text(to_json(experiment))
    moved = apply_overrides(experiment, [("sft.data.sources.a.path", "new/*.jsonl"),
                                         ("sft.data.sources.b.validation_path", "d.jsonl")])  # fmt: skip
    pipeline.check(moved, str(workdir))
    assert len(workdir_module.config_changes(moved, str(workdir))) == 2
    assert workdir_module.with_prepared_data(moved, str(workdir)) == experiment
    for field, value in (("validation_path", "more.jsonl"), ("validation_fraction", "0.5")):  # another split
        with pytest.raises(UserError, match="was made by another config"):
            pipeline.check(apply_overrides(experiment, [(f"sft.data.sources.a.{field}", value)]), str(workdir))


def test_data_of_a_stage_that_has_not_begun_are_read_where_they_are_now(begun):
    workdir, experiment = begun
    experiment = experiment.with_stage("reward", data=Rankings("old.jsonl"))
    (workdir / "config.json").write_text(to_json(experiment))
    moved = apply_overrides(experiment, [("reward.data.path", "new.jsonl")])
    pipeline.check(moved, str(workdir))
    assert workdir_module.with_prepared_data(moved, str(workdir)) == moved


def test_fields_that_a_workdir_does_not_know_yet_must_have_their_defaults(tmp_path):
    """What an older version has begun can be gone on with, as long as the new options are left alone."""
    experiment = load_experiment(f"{EXPERIMENTS}/quickstart.py:test")
    saved = to_dict(experiment)
    del saved["checkpoint_seconds"], saved["model"]["mtp_coef"], saved["stages"]["sft"]["lora"]
    del saved["evaluation"]["sampling"]["top_k"], saved["stages"]["ppo"]["algorithm"]["vf_coef"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    for stage in experiment.stages:
        (tmp_path / stage).mkdir()
    pipeline.check(experiment, str(tmp_path))
    for path, value, line in (
        ("model.mtp_coef", "0.5", "model.mtp_coef: absent -> 0.5"),
        ("sft.lora.rank", "2", "sft.lora: absent -> {"),
        ("ppo.algorithm.vf_coef", "0.25", "ppo.algorithm.vf_coef: absent -> 0.25"),
    ):
        with pytest.raises(UserError, match=re.escape(f"was made by another config ({line}")):
            pipeline.check(apply_overrides(experiment, [(path, value)]), str(tmp_path))


def test_a_workdir_of_classes_that_are_gone_is_one_line(tmp_path):
    """config.json is compared as JSON: nothing in it has to exist any more."""
    experiment = load_experiment(f"{EXPERIMENTS}/quickstart.py:test")
    saved = to_dict(experiment)
    saved["stages"]["sft"]["data"] = {"class": "Vanished", "path": "a.jsonl"}
    saved["old"] = 1
    (tmp_path / "config.json").write_text(json.dumps(saved))
    (tmp_path / "sft").mkdir()
    with pytest.raises(UserError, match="was made by another config") as error:
        pipeline.check(experiment, str(tmp_path))
    assert "\n" not in str(error.value)
    assert "sft.data: {class: Vanished, path: a.jsonl} -> {class: WorldDialogues" in str(error.value)
    assert "old: 1 -> absent" in str(error.value)


def test_study_is_checked_whole_before_it_starts(capsys, tmp_path):
    other = tmp_path / "moe" / "config.json"
    other.parent.mkdir()
    other.write_text(to_json(load_experiment(f"{EXPERIMENTS}/quickstart.py:test")))
    before = tree(tmp_path)
    assert f"--workdir={other.parent} was made by another config" in error_of(capsys, STUDY, f"--workdir={tmp_path}")
    assert tree(tmp_path) == before


def test_broken_config_in_workdir(capsys, tmp_path):
    (tmp_path / "config.json").write_text('{\n"name": \n')
    assert f"{tmp_path / 'config.json'}:3: not JSON" in error_of(capsys, f"{QUICKSTART}:test", f"--workdir={tmp_path}")


# ---- what is not an error ---------------------------------------------------------------------------------------


def output_of(capsys, *flags: str) -> str:
    base.call(train.run, ["llmjax", *flags])
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_print_config(capsys, workdir):
    flags = ["--print_config", f"--workdir={workdir}", "--config.ppo.algorithm.kl_coef=0.123", "--config.sft.steps=3"]
    printed = output_of(capsys, f"{QUICKSTART}:moe", *flags)
    overrides = [("ppo.algorithm.kl_coef", "0.123"), ("sft.steps", "3")]
    assert printed == to_json(apply_overrides(load_experiment(f"{EXPERIMENTS}/quickstart.py:moe"), overrides))
    config = json.loads(printed)
    assert list(config["stages"]) == ["pretrain", "sft", "reward", "ppo", "table"] and config["stages"]["sft"]["steps"] == 3
    assert config["stages"]["ppo"]["algorithm"]["kl_coef"] == 0.123 and config["model"]["moe"]["num_experts"] == 8


def test_a_stage_is_taken_out_by_none(capsys):
    flags = ["--config.ppo=none", "--config.table=none"]
    stages = json.loads(output_of(capsys, QUICKSTART, "--print_config", *flags))["stages"]
    assert list(stages) == ["pretrain", "sft", "reward"]
    with pytest.raises(UserError, match="table.rows='ppo' is not an earlier stage of this experiment"):
        train.run(["llmjax", QUICKSTART, "--print_config", flags[0]])


def test_overrides_of_a_study(capsys):
    def printed(*flags):
        runs = json.loads(output_of(capsys, STUDY, "--print_config", *flags))["experiments"]
        experts = {name: run["model"]["moe"] for name, run in runs.items()}
        coefs = {name: run["stages"]["ppo"]["algorithm"]["kl_coef"] for name, run in runs.items()}
        return {name: (coefs[name], experts[name] and experts[name]["top_k"]) for name in runs}

    kl_coef = "ppo.algorithm.kl_coef"
    both = printed(f"--config.{kl_coef}=0.5")
    assert both == {"dense": (0.5, None), "moe": (0.5, 2)}
    assert printed(f"--config.{kl_coef}=0.5", f"--config.moe.{kl_coef}=0.1") == both | {"moe": (0.1, 2)}
    assert printed(f"--config.{kl_coef}=0.5", "--config.model.moe.top_k=4") == both | {"moe": (0.5, 4)}


def test_help(capsys):
    with pytest.raises(SystemExit) as ended:
        base.call(train.run, ["llmjax", "--help"])
    captured = capsys.readouterr()
    assert ended.value.code == 0 and captured.err == ""
    assert captured.out.startswith(train.USAGE)
    flags = ("config", "workdir", "[no]print_config", "[no]preview", "cpu_devices")
    assert all(f"--{flag}" in captured.out for flag in flags)


INTERRUPTED = """
import signal, sys, threading, time
from llmjax.commands import base
from llmjax.training.stopping import heeded

def program(argv):
    threading.Thread(target=time.sleep, args=[600]).start()  # work in a thread that nothing can stop
    print("begun")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what started the tests may have had them ignored
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with heeded(print):
        signal.raise_signal(getattr(signal, sys.argv[1]))
        time.sleep(600)

base.call(program, ["llmjax"], interrupted="stopped here")
"""


@pytest.mark.parametrize(
    "name, status, words",
    [
        ("SIGINT", 130, "stopped here\n"),
        ("SIGTERM", 75, "stopped by SIGTERM; the same command goes on\n"),
        ("SIGHUP", 75, "stopped by SIGHUP; the same command goes on\n"),
    ],
)
def test_a_signal_is_one_line_and_ends_whatever_is_at_work(name, status, words):
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, name], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (status, "begun\n", words)


WHILE_LOADING = """
import signal
from llmjax.training.stopping import ending_at_once

signal.signal(signal.SIGHUP, signal.SIG_DFL)
with ending_at_once():
    try:
        signal.raise_signal(signal.SIGNAL)
    except BaseException:  # as libraries do that try what they can load
        pass
    print("went on")
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_while_libraries_are_loaded_passes_through_none_of_their_code(name):
    command = [sys.executable, "-c", WHILE_LOADING.replace("SIGNAL", name)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (75, "", f"stopped by {name}; the same command goes on\n")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
def test_a_disk_that_refuses_is_one_line(capfd, monkeypatch, number):
    """Wherever that was not foreseen."""
    monkeypatch.setattr(base, "_drop_output", lambda: None)  # else nothing of this process would be seen any more

    def broken(argv):
        raise OSError(number, os.strerror(number), "/some/file")

    with pytest.raises(SystemExit) as ended:
        base.call(broken, ["llmjax"])
    assert ended.value.code == 2
    assert capfd.readouterr().err == (
        f"llmjax: /some/file: {os.strerror(number)}; see that there is room and that it may be written, and the same command "
        "goes on\n"
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk_behind_the_output_is_one_line():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "llmjax", QUICKSTART, "--print_config"]
        done = subprocess.run(command, env=environment(), stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("llmjax: No space left on device; see that there is room")
    assert done.stderr.count("\n") == 1


def test_bugs_keep_their_traceback():
    def broken(argv):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        base.call(broken, ["llmjax"])


# ---- as a process -----------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """Without the virtual devices that tests/conftest.py asks for."""
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    env.pop("XLA_FLAGS", None)
    return env


@pytest.mark.parametrize(("flags", "message"), [
    (["--config.seed=x"], "--config.seed=x: expected int"),
    (["--config.mesh.tensor=4", "--cpu_devices=2"],
     "mesh: tensor=4 needs 4 devices, 2 found; lower --config.mesh.*; on CPU add --cpu_devices=4"),
])  # fmt: skip
def test_process(workdir, flags, message):
    command = [sys.executable, "-m", "llmjax", QUICKSTART, f"--workdir={workdir}", *flags]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("llmjax: ") and message in done.stderr
