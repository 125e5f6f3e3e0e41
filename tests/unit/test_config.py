"""llmjax.config: loading, overriding, validating, saving and comparing frozen dataclasses."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from typing import ClassVar, Literal

import pytest

from llmjax import config as config_lib
from llmjax.errors import UserError


def shorter(answer: str) -> float:
    return -len(answer)


@dataclasses.dataclass(frozen=True)
class Short:
    """A function with options."""

    most: int = 5

    def __call__(self, answer: str) -> float:
        return len(answer) <= self.most


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
    windows: tuple[int, ...] = ()
    shape: tuple[int, str] = (1, "x")
    max_length: int | None = None
    moe: MoE | None = None
    lora: Lora | None = None


class Source:
    """A base class that is no dataclass itself, as the library's `Data` and `Stage`."""


@dataclasses.dataclass(frozen=True)
class World(Source):
    facts: int = 10


@dataclasses.dataclass(frozen=True)
class Text(Source):
    path: str = "a.txt"


@dataclasses.dataclass(frozen=True)
class Gzip(Text):
    level: int = 6


@dataclasses.dataclass(frozen=True)
class Experiment:
    seed: int = 0
    name: str = "tiny"
    model: Model = Model()
    data: Source = World()
    mixture: tuple[Text, ...] = (Text("a"), Text("b"))
    stages: dict[str, Source] = dataclasses.field(default_factory=dict)
    weights: dict[str, float] | None = None
    scores: dict[str, Callable[[str], float]] = dataclasses.field(default_factory=dict)
    reward: str | Callable[[str], float] = "length"


@dataclasses.dataclass(frozen=True)
class Study:
    runs: dict[str, Experiment]
    table: bool = True
    shared: ClassVar[tuple[str, ...]] = ("runs",)


STUDY = Study({"dense": Experiment(), "sparse": Experiment(model=Model(moe=MoE()))})
STAGED = Experiment(stages={"text": Text("a"), "world": World()})


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
    ("norm", "layer", "layer"),
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
    ("model.windows", "1,b", "expected tuple[int, ...]; for example --config.model.windows=8,8"),
    ("model.shape", "1,2,3", "for example --config.model.shape=8,text"),
    ("model", "4", "Model cannot be set as a whole; set one of its fields: num_layers, dropout"),
    ("model.moe", "yes", "MoE cannot be set as a whole; set one of its fields: num_experts, top_k"),
    ("model.lora.rank", "4", "Lora cannot be made from its defaults (Lora.__init__() missing 1"),
    ("model.max_length.x", "4", "'model.max_length' is none and holds no fields"),
    ("seed.x", "4", "'seed' is of type int and has no fields"),
    ("mixture.1.path", "c", "'mixture' is of type tuple["),
    ("reward.x", "1", "'reward' is of type str or function and has no fields"),
    ("scores.short", "len", "a function cannot be set from the command line; set it in the experiment file"),
    ("scores", "len", "cannot be set as a whole; set one of its keys"),
    ("data", "Texts", "expected one of World, Text, Gzip, or a path to one of the fields below it"),
    ("data.level", "3", "no field 'level' in World; give --config.data=Gzip before it"),
    ("data.path", "b", "no field 'path' in World; give --config.data=Text or --config.data=Gzip before it"),
    ("data.fact", "3", "no field 'fact' in World; did you mean 'facts'?"),
    ("stages.text", "none", "no key 'text'; there is nothing"),
    ("weights.a", "x", "expected float; for example --config.weights.a=3e-4"),
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


def test_a_class_by_its_name_with_its_defaults():
    """Where an annotation leaves open which dataclass stands there, its name chooses one."""
    assert override(Experiment(), "data=Text").data == Text()
    assert override(Experiment(), "data=Gzip", "data.level=9", "data.path=b").data == Gzip("b", 9)
    assert override(Experiment(data=Text("b")), "data=Text").data == Text()
    assert override(Experiment(data=Gzip("b")), "data.level=1").data == Gzip("b", 1)
    assert override(Experiment(), "model.moe=MoE").model.moe == MoE()
    with pytest.raises(UserError, match="Lora cannot be made from its defaults .*; set 'model.lora' in the experiment file"):
        override(Experiment(), "model.lora=Lora")


def test_dicts_of_values_take_new_keys_and_none_takes_one_out():
    weighed = override(Experiment(), "weights.a=2", "weights.b=0.5")
    assert weighed.weights == {"a": 2.0, "b": 0.5} and type(weighed.weights["a"]) is float
    assert override(weighed, "weights.a=none").weights == {"b": 0.5}
    assert override(weighed, "weights=none").weights is None


def test_a_key_of_a_dict_of_configs_may_stand_for_its_field():
    one = override(STAGED, "text.path=b", "world.facts=3")
    assert one.stages == {"text": Text("b"), "world": World(3)} and STAGED.stages["world"] == World()
    assert override(STAGED, "stages.text.path=b", "stages.world.facts=3") == one
    assert override(STAGED, "text=Gzip", "text.level=2").stages["text"] == Gzip(level=2)
    assert list(override(STAGED, "text=none").stages) == ["world"]
    assert override(STAGED, "stages.text=none") == override(STAGED, "text=none")
    for path in ("txet.path=b", "stages.txet.path=b", "stages.txet=Text"):
        with pytest.raises(UserError, match="did you mean 'text'"):
            override(STAGED, path)


def test_a_field_wins_over_a_key_of_the_same_name():
    clash = Experiment(stages={"seed": World()})
    assert override(clash, "seed=4").seed == 4
    assert override(clash, "stages.seed.facts=4").stages["seed"] == World(4)


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


def test_study_hands_on_what_only_some_experiments_know():
    study = Study({"one": STAGED, "other": Experiment(stages={"text": Text("c")})})
    changed = override(study, "world.facts=4", "text.path=d")
    assert changed.runs["one"].stages == {"text": Text("d"), "world": World(4)}
    assert changed.runs["other"].stages == {"text": Text("d")}
    gone = override(study, "world=none")
    assert [list(run.stages) for run in gone.runs.values()] == [["text"], ["text"]]
    assert list(override(study, "other=none").runs) == ["one"]


def test_without_shared_nothing_is_handed_on():
    @dataclasses.dataclass(frozen=True)
    class Folder:
        runs: dict[str, Experiment]

    folder = Folder({"a": Experiment()})
    assert override(folder, "a.seed=1").runs["a"].seed == 1
    with pytest.raises(UserError, match="no field 'seed' in Folder; there is runs, a"):
        override(folder, "seed=1")


@pytest.mark.parametrize(("path", "near"), [("tabel", "table"), ("dnse.seed", "dense"), ("sed", "seed")])
def test_study_suggests_fields_keys_and_fields_of_experiments(path, near):
    with pytest.raises(UserError, match=f"did you mean '{near}'"):
        override(STUDY, f"{path}=1")


# ---- validate ---------------------------------------------------------------------------------------------------


def test_validate_prefixes_the_path():
    bad = Model(moe=MoE(top_k=9))
    with pytest.raises(UserError, match=r"^model\.moe: top_k=9 > num_experts=8; lower top_k$"):
        config_lib.validate(Experiment(model=bad))
    # A key stands in its dict's place, as on the command line.
    with pytest.raises(UserError, match=r"^dense\.model\.moe: top_k=9"):
        config_lib.validate(Study({"dense": Experiment(model=bad)}))
    with pytest.raises(UserError, match=r"^top_k=9"):
        config_lib.validate(MoE(top_k=9))
    config_lib.validate(STUDY)
    config_lib.validate(STAGED)
    config_lib.validate(Experiment(reward=shorter, scores={"short": shorter}, weights={"a": 1}))


@pytest.mark.parametrize(("bad", "message"), [
    (Experiment(seed="1"), "seed='1': expected int, got str"),
    (Experiment(seed=True), "seed=True: expected int, got bool"),
    (Experiment(model=Model(windows=[1])), "model.windows=[1]: expected tuple[int, ...], got list"),
    (Experiment(model=Model(norm="rsm")), "model.norm='rsm': expected one of rms, layer"),
    (Experiment(data=MoE()), "data=MoE(num_experts=8, top_k=2): expected Source, got MoE"),
    (Experiment(stages={"a": 3}), "stages={'a': 3}: expected dict[str, "),
    (Experiment(weights={"a": "b"}), "weights={'a': 'b'}: expected dict[str, float] or none"),
    (Experiment(reward=3), "reward=3: expected str or function"),
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
    model=Model(dropout=float("inf"), windows=(1, 2), shape=(2, "y"), moe=MoE(4, 1), lora=Lora(2)),
    stages={"text": Gzip("b"), "world": World()}, weights={"a": 1.0, "b": float("inf")},
)


@pytest.mark.parametrize("defaults", [True, False])
@pytest.mark.parametrize("config", [Experiment(), FULL, STUDY, STAGED, Study({"a": FULL})])
def test_json_round_trip(config, defaults):
    text = config_lib.to_json(config, defaults)
    data = json.loads(text, parse_constant=pytest.fail)  # strict JSON: no Infinity, no NaN
    assert data == config_lib.to_dict(config, defaults)
    assert config_lib.from_dict(type(config), data) == config


def test_where_the_class_is_open_it_is_tagged_and_nowhere_else():
    data = config_lib.to_dict(FULL)
    assert data["data"] == {"class": "Gzip", "path": "a.txt", "level": 9}
    assert data["stages"]["world"] == {"class": "World", "facts": 10}
    assert "class" not in data and "class" not in data["model"] and "class" not in data["model"]["moe"]


def test_defaults_may_be_left_out():
    """So that a field that is added later changes neither the saved text nor its fingerprint."""
    assert config_lib.to_dict(Experiment(), defaults=False) == {}
    assert config_lib.to_dict(FULL, defaults=False) == {
        "seed": 3,
        "model": {"dropout": "inf", "windows": [1, 2], "shape": [2, "y"], "moe": {"num_experts": 4, "top_k": 1},
                  "lora": {"rank": 2}},
        "data": {"class": "Gzip", "level": 9},
        "stages": {"text": {"class": "Gzip", "path": "b"}, "world": {"class": "World"}},
        "weights": {"a": 1.0, "b": "inf"},
    }  # fmt: skip


def test_a_part_is_compared_with_what_its_owner_gives_it_and_so_it_is_read():
    @dataclasses.dataclass(frozen=True)
    class Owner:
        moe: MoE = MoE(num_experts=4, top_k=1)

    assert config_lib.to_dict(Owner(MoE(8, 1)), defaults=False) == {"moe": {"num_experts": 8}}
    assert config_lib.to_dict(Owner(MoE(4, 2)), defaults=False) == {"moe": {"top_k": 2}}
    assert config_lib.from_dict(Owner, {"moe": {"num_experts": 8}}) == Owner(MoE(8, 1))


def test_functions_are_saved_by_module_and_name(tmp_path):
    data = config_lib.to_dict(Experiment(reward=shorter, scores={"short": shorter}))
    assert data["reward"] == f"{__name__}:shorter" and data["scores"] == {"short": f"{__name__}:shorter"}
    body = (
        "from typing import Any\n@dataclasses.dataclass(frozen=True)\nclass Scored:\n    reward: Any\n"
        "def polite(answer):\n    return 1.0\ndef get_config():\n    return Scored(polite)\n"
    )
    one, other = (tmp_path / name for name in ("a", "b"))
    for folder in (one, other):
        folder.mkdir()
    first, second = (config_lib.load_experiment(write(folder, body)) for folder in (one, other))
    # Where the file lies is no part of the experiment.
    assert config_lib.to_dict(first) == config_lib.to_dict(second) == {"reward": "exp:polite"}
    assert config_lib.fingerprint(Experiment(reward=shorter)) != config_lib.fingerprint(Experiment())


def test_a_function_with_options_is_a_config():
    scored = Experiment(reward=Short(), scores={"short": Short(), "plain": shorter})
    data = config_lib.to_dict(scored)
    assert data["reward"] == data["scores"]["short"] == {"class": "Short", "most": 5}
    assert config_lib.to_dict(Experiment(reward=Short()), defaults=False) == {"reward": {"class": "Short"}}
    changed = override(scored, "scores.short.most=3", "reward.most=2")
    assert (changed.scores["short"], changed.reward, changed.scores["plain"]) == (Short(3), Short(2), shorter)
    assert override(scored, "scores.short=none").scores == {"plain": shorter}
    assert override(Experiment(scores={"short": Short()}), "short.most=3").scores == {"short": Short(3)}
    config_lib.validate(changed)


def test_fields_that_are_not_saved_take_their_default():
    assert config_lib.from_dict(Experiment, {"seed": 4}) == Experiment(seed=4)


@pytest.mark.parametrize(("data", "message"), [
    ({"sed": 1}, "Experiment: no field 'sed' in Experiment; did you mean 'seed'?"),
    ({"seed": "1"}, "seed='1': expected int"),
    ({"seed": 1.5}, "seed=1.5: expected int"),
    ({"model": {"lora": {}}}, "model.lora: field 'rank' of Lora is missing"),
    ({"model": {"windows": [1, "b"]}}, "model.windows.1='b': expected int"),
    ({"model": {"norm": "rsm"}}, "model.norm='rsm': expected one of rms, layer"),
    ({"data": {"class": "Wrld"}}, "data: unknown class 'Wrld'; did you mean 'World'?"),
    ({"data": {"facts": 3}}, "data: unknown class None; did you mean 'World'?"),
    ({"stages": {"a": {"class": "World", "fact": 3}}}, "stages.a: no field 'fact' in World; did you mean 'facts'?"),
    ({"weights": {"a": "b"}}, "weights.a='b': expected float"),
    ({"model": 3}, "model=3: expected Model"),
])
def test_from_dict_names_the_place(data, message):
    with pytest.raises(UserError) as caught:
        config_lib.from_dict(Experiment, data)
    assert str(caught.value).startswith(message)


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
    assert config_lib.fingerprint(config_lib.to_dict(Experiment())) == base


def test_diff_lists_leaves():
    other = override(Experiment(), "model.num_layers=8", "model.moe.top_k=1", "model.windows=1,2")
    assert config_lib.diff(Experiment(), other) == [
        "model.num_layers: 2 -> 8", "model.windows: () -> 1,2", "model.moe: none -> {num_experts: 8, top_k: 1}",
    ]
    assert config_lib.diff(STUDY, STUDY) == []
    assert config_lib.diff(Study({"a": Experiment()}), Study({"a": Experiment(seed=1)})) == ["runs.a.seed: 0 -> 1"]
    (added,) = config_lib.diff(Study({}), Study({"a": Experiment()}))
    assert added.startswith("runs.a: absent -> {seed: 0, name: tiny, model: {num_layers: 2,")
    (removed,) = config_lib.diff(STAGED, override(STAGED, "text=none"))
    assert removed == "stages.text: {class: Text, path: a} -> absent"
    (other,) = config_lib.diff(Experiment(), Experiment(data=Text("b")))
    assert other == "data: {class: World, facts: 10} -> {class: Text, path: b}"
    assert config_lib.diff(Experiment(model=Model(tied=True)), Experiment(model=Model(tied=1))) == [
        "model.tied: true -> 1"
    ]


def test_diff_of_what_was_saved():
    """A saved config may be of a class that has changed since: its dict is enough."""
    old = config_lib.to_dict(Experiment())
    del old["seed"]
    old["model"]["depth"] = 1
    assert config_lib.diff(old, Experiment()) == ["model.depth: 1 -> absent", "seed: absent -> 0"]


def test_show_is_what_one_would_type():
    values = [None, True, 3e-4, (1, 2), (), "x", {"a": 1, "b": None}, MoE(top_k=1), {"a": (World(),)}]
    assert [config_lib.show(value) for value in values] == [
        "none", "true", "0.0003", "1,2", "()", "x", "{a: 1, b: none}", "MoE(num_experts=8, top_k=1)", "{a: World(facts=10)}",
    ]  # fmt: skip


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
