"""Published models have their published sizes; nothing is allocated."""

import jax
import pytest

from llmjax.config import validate
from llmjax.errors import UserError
from llmjax.models.presets import PRESETS, preset
from llmjax.models.spec import abstract_params
from llmjax.models.stats import active_params, total_params
from llmjax.models.transformer import transformer_spec

# Billions: all parameters and those active for a token, embeddings included, from the model cards and reports. Untied
# totals; multi-token-prediction layers are not counted.
PUBLISHED = {
    "llama3-8b": (8.03, 8.03),
    "llama3-70b": (70.55, 70.55),
    "llama3.2-1b": (1.236, 1.236),
    "llama3.1-8b": (8.03, 8.03),
    "llama3.1-70b": (70.55, 70.55),
    "llama3.1-405b": (405.85, 405.85),
    "qwen2.5-0.5b": (0.494, 0.494),
    "qwen2.5-1.5b": (1.544, 1.544),
    "qwen2.5-7b": (7.62, 7.62),
    "qwen3-0.6b": (0.596, 0.596),
    "qwen3-1.7b": (1.72, 1.72),
    "qwen3-4b": (4.02, 4.02),
    "qwen3-8b": (8.19, 8.19),
    "qwen3-14b": (14.77, 14.77),
    "qwen3-32b": (32.76, 32.76),
    "mistral-7b": (7.24, 7.24),
    "phi3-mini": (3.82, 3.82),
    "phi4": (14.66, 14.66),
    "olmo2-1b": (1.485, 1.485),
    "olmo2-7b": (7.30, 7.30),
    "gemma-2b": (2.51, 2.51),
    "gemma-7b": (8.54, 8.54),
    "gemma3-270m": (0.268, 0.268),
    "gemma3-1b": (1.00, 1.00),
    "gemma3-4b": (3.88, 3.88),
    "gemma3-12b": (11.77, 11.77),
    "gemma3-27b": (27.01, 27.01),
    "mixtral-8x7b": (46.70, 12.88),
    "mixtral-8x22b": (140.63, 39.16),
    "qwen3-30b-a3b": (30.53, 3.35),
    "qwen3-235b-a22b": (235.09, 22.19),
    "olmoe-1b-7b": (6.92, 1.28),
    "deepseek-v2": (235.74, 21.38),
    "deepseek-v3": (671.03, 37.55),
    "gpt-oss-20b": (20.91, 4.19),
    "gpt-oss-120b": (116.83, 5.71),
}


def test_every_preset_has_a_published_size():
    assert PUBLISHED.keys() == PRESETS.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_invariant_29_published_sizes(name):
    cfg = preset(name)
    validate(cfg)
    total, active = PUBLISHED[name]
    assert total_params(cfg) / 1e9 == pytest.approx(total, rel=2e-3)
    assert active_params(cfg) / 1e9 == pytest.approx(active, rel=2e-3)
    leaves = jax.tree.leaves(abstract_params(transformer_spec(cfg)))
    assert sum(leaf.size for leaf in leaves) == total_params(cfg)


def test_a_preset_with_a_change_and_an_unknown_one():
    assert preset("llama3-8b", num_layers=2).num_layers == 2
    with pytest.raises(UserError, match="no model is called 'mixtral-8x7'; did you mean 'mixtral-8x7b'"):
        preset("mixtral-8x7")


def test_multi_token_prediction_of_deepseek_v3():
    """The release counts 11.5 billion parameters that the main model does not share; its shapes give 11.61."""
    more = total_params(preset("deepseek-v3", num_mtp_layers=1)) - total_params(preset("deepseek-v3"))
    assert more / 1e9 == pytest.approx(11.5, rel=1e-2)
