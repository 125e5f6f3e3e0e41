"""Configs: nests of frozen, typed dataclasses. Load, override, validate, save, compare. Nothing here imports jax."""

from llmjax.config.fields import children, did_you_mean, is_config, show
from llmjax.config.io import diff, fingerprint, from_dict, load_experiment, to_dict, to_json, validate
from llmjax.config.overrides import apply_overrides, split_overrides
from llmjax.config.ranges import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Range

__all__ = [
    "Fraction", "NonNegativeFloat", "NonNegativeInt", "PositiveFloat", "PositiveInt", "Range", "apply_overrides", "children",
    "did_you_mean", "diff", "fingerprint", "from_dict", "is_config", "load_experiment", "show", "split_overrides", "to_dict",
    "to_json", "validate",
]  # fmt: skip
