"""Every number of a config has a range, and what lies outside is refused before anything starts."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated

import pytest

from llmjax.config import NonNegativeInt, PositiveFloat, Range, apply_overrides, load_experiment, validate
from llmjax.config.fields import config_classes, field_types, is_mapping, members, value_type
from llmjax.config.ranges import Fraction, outside
from llmjax.errors import UserError
from llmjax.generation.sampling import SamplingConfig
from llmjax.models.lora import LoRAConfig
from llmjax.rl.algorithms import GRPO, PPO
from llmjax.stages.experiment import Experiment
from llmjax.stages.preference import DPO
from llmjax.stages.pretrain import Pretrain
from llmjax.stages.reward import RewardModel
from llmjax.stages.rl import RL
from llmjax.stages.sft import SFT
from llmjax.tasks.verify import Number
from llmjax.tasks.world.data import WorldText
from llmjax.training.optimizer import OptimizerConfig


@pytest.mark.parametrize(
    "bounds, good, bad, words",
    [
        (dict(above=0), (1e-30, 5), (0, -1), "positive"),
        (dict(least=0), (0, 7), (-1e-30, -1), "0 or more"),
        (dict(least=0, most=1), (0, 0.5, 1), (-0.1, 1.1), "between 0 and 1"),
        (dict(above=0, below=1), (0.5,), (0, 1), "more than 0 and less than 1"),
        (dict(least=0, below=1), (0, 0.99), (1, -1), "at least 0 and less than 1"),
        (dict(least=2), (2, 3), (1,), "at least 2"),
        (dict(), (-1e30, 0), (), "finite"),
    ],
)
def test_a_range(bounds, good, bad, words):
    one = Range(**bounds)
    assert str(one) == words
    assert all(map(one.holds, good)) and not any(map(one.holds, bad))
    assert not any(map(one.holds, (math.nan, math.inf, -math.inf)))


@dataclass(frozen=True)
class Everywhere:
    plain: float = 0.0
    maybe: PositiveFloat | None = None
    pair: tuple[float, NonNegativeInt] = (0.0, 0)
    many: tuple[Fraction, ...] = ()
    named: dict[str, PositiveFloat] = dataclasses.field(default_factory=dict)
    either: Annotated[int, Range(least=2)] | str = "none"
    flag: bool = False
    anything: object = None


def test_numbers_are_found_wherever_they_are():
    assert not list(outside(Everywhere(anything=(1.0, {"a": 2}), flag=True, maybe=0.1, many=(0.0, 1.0), either=2)))
    wrong = Everywhere(math.nan, 0.0, (math.inf, -1), (0.5, 1.5), {"a": 1.0, "b": -2.0}, 1, False, (math.nan,))
    assert list(outside(wrong)) == [
        "plain=nan must be finite", "maybe=0.0 must be positive", "pair.0=inf must be finite", "pair.1=-1 must be 0 or more",
        "many.1=1.5 must be between 0 and 1", "named.b=-2.0 must be positive", "either=1 must be at least 2",
        "anything.0=nan must be finite",
    ]  # fmt: skip


def every_class() -> dict[str, type]:
    """Every dataclass that an experiment can be made of."""
    found, left = {}, [Experiment]
    while left:
        cls = left.pop()
        if cls.__module__.startswith("llmjax.") and cls.__name__ not in found:
            found[cls.__name__] = cls
            for hint in field_types(cls).values():
                inner = [value_type(hint)] if is_mapping(hint) else [hint]
                left += [one for each in inner for one in config_classes(each).values()]
    return found


CLASSES = every_class()
NUMBERS = [
    (cls, name)
    for cls in CLASSES.values()
    for name, hint in field_types(cls).items()
    if {int, float} & {member for member in members(hint) if isinstance(member, type)}
]


def test_they_are_all_there():
    known = {Pretrain, SFT, RewardModel, RL, DPO, PPO, GRPO, OptimizerConfig, LoRAConfig, SamplingConfig, WorldText}
    assert known <= set(CLASSES.values()) and {"ModelConfig", "MoEConfig", "MLAConfig", "RopeScaling"} <= set(CLASSES)
    assert len(NUMBERS) > 100


@pytest.mark.parametrize("cls, name", NUMBERS, ids=[f"{cls.__name__}.{name}" for cls, name in NUMBERS])
def test_no_number_may_be_nan_infinite_or_of_the_wrong_sign(cls, name):
    """Negative numbers have a meaning in a few fields only."""
    config = object.__new__(cls)
    for field in field_types(cls):
        object.__setattr__(config, field, None)
    signed = {"norm_offset", "missing_end_penalty"}
    for value in (math.nan, math.inf, -math.inf, *([] if name in signed else [-1])):
        object.__setattr__(config, name, value)
        assert [line.split("=")[0] for line in outside(config)] == [name], value


@pytest.mark.parametrize(
    "path, value, line",
    [
        ("pretrain.optimizer.grad_clip", "-1", "pretrain.optimizer: grad_clip=-1.0 must be 0 or more"),
        ("pretrain.optimizer.learning_rate", "0", "pretrain.optimizer: learning_rate=0.0 must be positive"),
        ("pretrain.optimizer.eps", "0", "pretrain.optimizer: eps=0.0 must be positive"),
        ("pretrain.optimizer.weight_decay", "-0.1", "pretrain.optimizer: weight_decay=-0.1 must be 0 or more"),
        ("model.rope_theta", "inf", "model: rope_theta=inf must be positive"),
        ("ppo.algorithm.value_clip", "-1", "ppo.algorithm: value_clip=-1.0 must be positive"),
        ("ppo.algorithm.kl_coef", "-1", "ppo.algorithm: kl_coef=-1.0 must be 0 or more"),
        ("ppo.temperature", "0", "ppo: temperature=0.0 must be positive"),
        ("evaluation.sampling.temperature", "-0.5", "evaluation.sampling: temperature=-0.5 must be 0 or more"),
        ("mesh.fsdp", "0", "mesh: fsdp=0 must be positive"),
        ("seed", "-1", "seed=-1 must be 0 or more"),
    ],
)
def test_the_line_says_where_and_what(path, value, line):
    config = apply_overrides(load_experiment("experiments/quickstart.py:test"), [(path, value)])
    with pytest.raises(UserError) as error:
        validate(config)
    assert str(error.value) == line


def test_what_is_right_passes():
    optimizer = OptimizerConfig(grad_clip=0.0, warmup_steps=0, weight_decay=0.0, b1=0.0, final_fraction=1.0)
    sampling = SamplingConfig(temperature=0.0, top_k=0, top_p=1.0)
    assert not [line for one in (optimizer, sampling, Number(tolerance=0.0)) for line in outside(one)]
