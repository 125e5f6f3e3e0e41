"""llmjax.config and llmjax.overrides: loading, overriding, validating, saving and comparing frozen dataclasses."""

import dataclasses
import enum
import json
import subprocess
import sys
from typing import Literal

import pytest

from llmjax import config as config_lib
from llmjax.errors import UserError


class Remat(enum.Enum):
    NONE = "none"
    FULL = "full"


@dataclasses.dataclass(frozen=True)
class MoE:
    num_experts: int = 8
    top_k: int = 2

    def validate(self):
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} > num_experts={self.num_experts}; lower top_k")


@dataclasses.dataclass(frozen=True)
class Lora:
    rank: int


@dataclasses.dataclass(frozen=True)
class Model:
    num_layers: int = 2
    dropout: float = 0.0
    tied: bool = False
    norm: Literal["rms", "layer"] = "rms"
    remat: Remat = Remat.NONE
    windows: tuple[int, ...] = ()
    shape: tuple[int, str] = (1, "x")
    max_length: int | None = None
    moe: MoE | None = None
    lora: Lora | None = None


@dataclasses.dataclass(frozen=True)
class World:
    facts: int = 10


@dataclasses.dataclass(frozen=True)
class Text:
    path: str = "a.txt"


@dataclasses.dataclass(frozen=True)
class Gzip(Text):
    level: int = 6


@dataclasses.dataclass(frozen=True)
class Experiment:
    seed: int = 0
    name: str = "tiny"
    model: Model = Model()
    data: World | Text = World()
    mixture: tuple[Text, ...] = (Text("a"), Text("b"))


@dataclasses.dataclass(frozen=True)
class Study:
    runs: dict[str, Experiment]
    table: bool = True


STUDY = Study({"dense": Experiment(), "sparse": Experiment(model=Model(moe=MoE()))})


def override(config, *pairs):
    return config_lib.apply_overrides(config, [tuple(pair.split("=", 1)) for pair in pairs])


# ---- overrides --------------------------------------------------------------------------------------------------


def test_split_overrides_leaves_the_rest_for_absl():
    argv = ["llmjax", "--config=x.py:moe", "--config.a.b=1=2", "--workdir=w", "-config.c", "-3", "--config", "y.py",
            "--", "--config.z=1"]
    rest, overrides = config_lib.split_overrides(argv)
    assert rest == ["llmjax", "--config=x.py:moe", "--workdir=w", "--config", "y.py", "--", "--config.z=1"]
    assert overrides == [("a.b", "1=2"), ("c", "-3")]


@pytest.mark.parametrize("argv", [["--config.a"], ["--config.a", "--workdir=x"], ["--config.a..b=1"], ["--config.=1"]])
def test_split_overrides_refuses_half_written(argv):
    with pytest.raises(UserError, match=r"^--config\."):
        config_lib.split_overrides(argv)


@pytest.mark.parametrize(("path", "raw", "expected"), [
    ("num_layers", "4", 4), ("num_layers", "1e6", 1_000_000), ("num_layers", "2_000", 2000), ("num_layers", "-1", -1),
    ("dropout", "1e-3", 1e-3), ("dropout", "1", 1.0), ("dropout", "inf", float("inf")),
    ("tied", "true", True), ("tied", "0", False), ("tied", "False", False),
    ("norm", "layer", "layer"), ("remat", "FULL", Remat.FULL), ("remat", "full", Remat.FULL),
    ("windows", "1,2,3", (1, 2, 3)), ("windows", "(4, 5,)", (4, 5)), ("windows", "[6]", (6,)), ("windows", "()", ()),
    ("windows", "", ()), ("shape", "3,y", (3, "y")),
    ("max_length", "8", 8), ("max_length", "none", None), ("max_length", "None", None), ("moe", "none", None),
])
def test_values_are_cast_by_annotation(path, raw, expected):
    start = Experiment(model=Model(max_length=3, moe=MoE(), windows=(9,)))
    value = getattr(override(start, f"model.{path}={raw}").model, path)
    assert value == expected
    assert type(value) is type(expected)
    assert start.model.num_layers == 2  # the original is left as it was


def test_plain_str_keeps_the_word_none():
    assert override(Experiment(), "name=none").name == "none"


@pytest.mark.parametrize(("path", "raw", "message"), [
    ("modle.num_layers", "4", "--config.modle.num_layers=4: no field 'modle' in Experiment; did you mean 'model'?"),
    ("model.layers", "4", "--config.model.layers=4: no field 'layers' in Model; did you mean 'num_layers'?"),
    ("model.num_layers", "1.5",
     "--config.model.num_layers=1.5: expected int; for example --config.model.num_layers=8"),
    ("model.num_layers", "four",
     "--config.model.num_layers=four: expected int; for example --config.model.num_layers=8"),
    ("model.num_layers", "true", "expected int"), ("model.num_layers", "1e999999999", "expected int"),
    ("model.num_layers", "none", "expected int"), ("model.dropout", "nan", "expected float"),
    ("model.max_length", "x", "expected int or none; for example --config.model.max_length=8"),
    ("model.tied", "yes", "expected bool; for example --config.model.tied=true"),
    ("model.norm", "layr", "expected one of rms, layer; did you mean 'layer'?"),
    ("model.remat", "FUL", "expected one of NONE, FULL; did you mean 'FULL'?"),
    ("model.windows", "1,b", "expected tuple[int, ...]; for example --config.model.windows=8,8"),
    ("model.shape", "1,2,3", "for example --config.model.shape=8,text"),
    ("model", "4", "Model cannot be set as a whole; set one of its fields: num_layers, dropout"),
    ("model.moe", "yes", "MoE cannot be set as a whole; set one of its fields: num_experts, top_k"),
    ("model.lora.rank", "4", "'model.lora' is none and Lora cannot be made from its defaults"),
    ("model.max_length.x", "4", "'model.max_length' is none and holds no fields"),
    ("seed.x", "4", "'seed' is of type int and has no fields"),
    ("mixture.2.path", "c", "no item '2' in a tuple of 2"),
])
def test_wrong_overrides_are_one_clear_line(path, raw, message):
    with pytest.raises(UserError) as caught:
        config_lib.apply_overrides(Experiment(), [(path, raw)])
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"--config.{path}={raw}: ")
    assert "\n" not in str(caught.value)


def test_a_field_below_none_creates_the_optional_dataclass():
    changed = override(Experiment(), "model.moe.top_k=1")
    assert changed.model.moe == MoE(num_experts=8, top_k=1)


def test_items_of_tuples_have_numbers():
    assert override(Experiment(), "mixture.1.path=c").mixture == (Text("a"), Text("c"))


def test_later_overrides_win():
    assert override(Experiment(), "seed=1", "seed=2").seed == 2


def test_an_exception_of_post_init_names_the_override():
    @dataclasses.dataclass(frozen=True)
    class Even:
        size: int = 2

        def __post_init__(self):
            if self.size % 2:
                raise ValueError("size must be even")

    with pytest.raises(UserError, match=r"^--config\.size=3: size must be even$"):
        override(Even(), "size=3")


def test_study_fields_then_keys_then_every_experiment():
    assert override(STUDY, "table=false").table is False
    one = override(STUDY, "dense.seed=5")
    assert [run.seed for run in one.runs.values()] == [5, 0]
    assert override(STUDY, "runs.dense.seed=5") == one
    both = override(STUDY, "model.num_layers=7")
    assert [run.model.num_layers for run in both.runs.values()] == [7, 7]
    assert override(STUDY, "dense.model.moe.top_k=1").runs["dense"].model.moe == MoE(top_k=1)


def test_study_override_of_moe_leaves_the_dense_run_dense():
    changed = override(STUDY, "model.moe.top_k=1")
    assert changed.runs["dense"].model.moe is None
    assert changed.runs["sparse"].model.moe == MoE(top_k=1)


@pytest.mark.parametrize(("path", "near"), [("tabel", "table"), ("dnse.seed", "dense"), ("sed", "seed")])
def test_study_suggests_fields_keys_and_fields_of_experiments(path, near):
    with pytest.raises(UserError, match=f"did you mean '{near}'"):
        override(STUDY, f"{path}=1")


# ---- validate ---------------------------------------------------------------------------------------------------


def test_validate_prefixes_the_path():
    bad = Model(moe=MoE(top_k=9))
    with pytest.raises(UserError, match=r"^model\.moe: top_k=9 > num_experts=8; lower top_k$"):
        config_lib.validate(Experiment(model=bad))
    with pytest.raises(UserError, match=r"^runs\.dense\.model\.moe: top_k=9"):
        config_lib.validate(Study({"dense": Experiment(model=bad)}))
    with pytest.raises(UserError, match=r"^MoE: top_k=9"):
        config_lib.validate(MoE(top_k=9))
    config_lib.validate(STUDY)


@pytest.mark.parametrize(("bad", "message"), [
    (Experiment(seed="1"), "seed='1': expected int, got str"),
    (Experiment(seed=True), "seed=True: expected int, got bool"),
    (Experiment(model=Model(windows=[1])), "model.windows=[1]: expected tuple[int, ...], got list"),
    (Experiment(model=Model(norm="rsm")), "model.norm='rsm': expected one of rms, layer"),
])
def test_validate_checks_types(bad, message):
    with pytest.raises(UserError) as caught:
        config_lib.validate(bad)
    assert str(caught.value).startswith(message)


def test_validate_lets_bugs_through():
    @dataclasses.dataclass(frozen=True)
    class Buggy:
        def validate(self):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        config_lib.validate(Buggy())


# ---- JSON -------------------------------------------------------------------------------------------------------


FULL = Experiment(
    seed=3, data=Gzip(level=9),
    model=Model(dropout=float("inf"), remat=Remat.FULL, windows=(1, 2), shape=(2, "y"), moe=MoE(4, 1), lora=Lora(2)),
)


@pytest.mark.parametrize("config", [Experiment(), FULL, STUDY, Study({"a": FULL})])
def test_json_round_trip(config):
    text = config_lib.to_json(config)
    json.loads(text, parse_constant=pytest.fail)  # strict JSON: no Infinity, no NaN
    assert config_lib.from_json(type(config), text) == config
    assert config_lib.from_dict(type(config), config_lib.to_dict(config)) == config


def test_unions_and_subclasses_are_tagged_and_nothing_else():
    data = config_lib.to_dict(FULL)
    assert data["data"] == {"class": "Gzip", "path": "a.txt", "level": 9}
    assert "class" not in data and "class" not in data["model"] and "class" not in data["model"]["moe"]


def test_fields_that_are_not_saved_take_their_default():
    assert config_lib.from_dict(Experiment, {"seed": 4}) == Experiment(seed=4)


@pytest.mark.parametrize(("data", "message"), [
    ({"sed": 1}, "Experiment: no field 'sed' in Experiment; did you mean 'seed'?"),
    ({"seed": "1"}, "seed='1': expected int"),
    ({"seed": 1.5}, "seed=1.5: expected int"),
    ({"model": {"lora": {}}}, "model.lora: field 'rank' of Lora is missing"),
    ({"model": {"windows": [1, "b"]}}, "model.windows.1='b': expected int"),
    ({"model": {"remat": "HALF"}}, "model.remat='HALF': expected one of NONE, FULL"),
    ({"data": {"class": "Wrld"}}, "data: unknown class 'Wrld'; did you mean 'World'?"),
    ({"model": 3}, "model=3: expected Model"),
])
def test_from_dict_names_the_place(data, message):
    with pytest.raises(UserError) as caught:
        config_lib.from_dict(Experiment, data)
    assert str(caught.value).startswith(message)


def test_from_json_says_which_line_is_broken():
    with pytest.raises(UserError, match="line 2 is not JSON"):
        config_lib.from_json(Experiment, '{"seed": 1,\n')


def test_what_cannot_be_saved_is_a_bug():
    @dataclasses.dataclass(frozen=True)
    class Holder:
        value: object = None

    with pytest.raises(TypeError, match="Holder.value: a set cannot be saved"):
        config_lib.to_dict(Holder({1}))


def test_fingerprint_follows_content():
    base = config_lib.fingerprint(Experiment())
    assert len(base) == 12 and int(base, 16) >= 0
    assert config_lib.fingerprint(Experiment(model=Model(dropout=0))) == base  # 0 == 0.0, so the same experiment
    assert config_lib.fingerprint(Experiment(seed=1)) != base
    assert config_lib.fingerprint(Experiment(data=Text())) != base


def test_diff_lists_leaves():
    other = override(Experiment(), "model.num_layers=8", "model.moe.top_k=1", "model.windows=1,2")
    assert config_lib.diff(Experiment(), other) == [
        "model.num_layers: 2 -> 8", "model.windows: () -> 1,2", "model.moe: none -> MoE(num_experts=8, top_k=1)",
    ]
    assert config_lib.diff(STUDY, STUDY) == []
    assert config_lib.diff(Study({"a": Experiment()}), Study({"a": Experiment(seed=1)})) == ["runs.a.seed: 0 -> 1"]
    assert config_lib.diff(Study({}), Study({"a": Experiment()}))[0].startswith("runs.a: absent -> Experiment(seed=0")


def test_describe_is_an_outline():
    text = config_lib.describe(STUDY)
    assert text.splitlines()[:6] == [
        "Study", "  runs:", "    dense: Experiment", "      seed: 0", "      name: tiny", "      model: Model",
    ]
    assert "        moe: none" in text.splitlines()
    assert "          top_k: 2" in text.splitlines()
    assert text.splitlines()[-1] == "  table: true"


# ---- experiment files -------------------------------------------------------------------------------------------


HEADER = """from __future__ import annotations
import dataclasses
@dataclasses.dataclass(frozen=True)
class Config:
    size: int = 1
"""


def write(folder, body, name="exp.py"):
    (folder / name).write_text(HEADER + body)
    return str(folder / name)


def test_load_experiment_with_and_without_argument(tmp_path):
    path = write(tmp_path, "def get_config(arg='1'):\n    return Config(int(arg))\n")
    assert config_lib.load_experiment(path).size == 1
    loaded = config_lib.load_experiment(path + ":7")
    assert override(loaded, "size=9").size == 9  # annotations of the file's own classes resolve


def test_experiments_may_import_their_neighbours(tmp_path):
    package = tmp_path / "exps"
    package.mkdir()
    (package / "__init__.py").write_text("")
    write(package, "BASE = Config(5)\n", "base_llmjax_test.py")
    write(package, "def get_config():\n    from exps.base_llmjax_test import BASE\n    return BASE\n")
    before = list(sys.path)
    assert config_lib.load_experiment(str(package / "exp.py")).size == 5
    assert sys.path == before


@pytest.mark.parametrize(("body", "suffix", "message"), [
    ("def get_config(): return Config()\n", ":moe", "get_config() takes no argument; leave out ':moe'"),
    ("def get_config(size): return Config()\n", "", "needs an argument; write --config=FILE.py:SIZE"),
    ("x = 1\n", "", "has no function get_config"),
    ("def get_config(): return {'a': 1}\n", "", "get_config returned a dict; return a dataclass"),
    ("def get_config(arg): raise ValueError('no such size')\n", ":moe", ":moe: no such size"),
    ("def get_config(arg): return {'dense': Config()}[arg]\n", ":moe", "unknown argument 'moe'"),
    ("from typing import Literal\ndef get_config(arg: Literal['dense', 'moe'] = 'dense'): return Config()\n",
     ":mo", "unknown argument 'mo'; did you mean 'moe'?"),
])
def test_load_experiment_errors(tmp_path, body, suffix, message):
    spec = write(tmp_path, body) + suffix
    with pytest.raises(UserError) as caught:
        config_lib.load_experiment(spec)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"--config={spec}: ")


def test_load_experiment_missing_file_suggests_a_neighbour(tmp_path):
    write(tmp_path, "", "quickstart.py")
    with pytest.raises(UserError, match=r"no file .*quikstart\.py; did you mean '.*quickstart\.py'\?"):
        config_lib.load_experiment(str(tmp_path / "quikstart.py") + ":moe")


@pytest.mark.parametrize(("body", "error"), [
    ("def get_config(): return Config(1, 2)\n", TypeError),
    ("def get_config(arg='x'): return {}['other']\n", KeyError),
    ("import no_such_module_llmjax\n", ModuleNotFoundError),
    ("def get_config(:\n", SyntaxError),
])
def test_bugs_in_an_experiment_keep_their_traceback(tmp_path, body, error):
    with pytest.raises(error):
        config_lib.load_experiment(write(tmp_path, body))


def test_importing_config_does_not_import_jax():
    code = "import sys, llmjax.config, llmjax.files; assert not {'jax', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
