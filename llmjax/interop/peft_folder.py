"""LoRA updates as PEFT keeps them: adapter_config.json and adapter_model.safetensors, in and out.

A matrix of the model has lora_A [r, in] and lora_B [out, r], and is used as weight + (alpha / r) lora_B lora_A. The experts of
a layer are two parameters, gate_up_proj and down_proj, whose lora_A is [E r, in], one expert after the other, and whose lora_B
is [out, r E], where the expert changes fastest; older adapters have a pair for each matrix of each expert.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from safetensors.numpy import save_file

from llmjax.errors import UserError
from llmjax.files import read_json, whole_folder, write_json_atomic
from llmjax.interop.hf_folder import check_dtype, open_tensors
from llmjax.interop.hf_tensors import INTERLEAVED, INTO, OUT, Form, Leaf, leaves, tensor_map
from llmjax.models.config import ModelConfig
from llmjax.models.linear import LowRank
from llmjax.models.lora import ADAPTABLE, LoRAConfig, lora_spec
from llmjax.models.spec import is_spec, shardings
from llmjax.models.transformer import Params

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_ROOT = "base_model.model."
_PLAIN = {
    "peft_type": ("LORA",), "bias": ("none", None), "use_dora": (False, None), "fan_in_fan_out": (False, None),
    "lora_bias": (False, None), "modules_to_save": (None, []), "trainable_token_indices": (None, []),
    "init_lora_weights": (False, "gaussian", "orthogonal", None, True), "alora_invocation_tokens": ([], None),
}  # fmt: skip
"""What an adapter may say, if it is to be nothing but low-rank updates of matrices."""
_ALONE = Form(lambda x, shapes: (x,), lambda w: w)
_HALVES = Form(lambda x, shapes: tuple(np.split(x, 2, axis=-1)), lambda *parts: np.concatenate(parts, axis=-1))


@dataclass(frozen=True)
class _Pair:
    """What has one pair of factors. name: of the module or parameter; tensor: what the pair's names on disk begin with.

    parts: where its weight lies in our leaves; form: as in `tensor_map`. num: experts in the pair, 0 for one matrix.
    """

    name: str
    tensor: str
    parts: tuple[tuple[Leaf, tuple[int, ...]], ...]
    form: Form
    num: int = 0

    @property
    def leaves(self) -> set[Leaf]:
        return {leaf for leaf, _ in self.parts}

    @property
    def num_in(self) -> int:
        return 2 if self.form is OUT else 1

    def to_disk(self, a: np.ndarray, bs: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Our a ([E], in..., r) and, for each part, b ([E], r, out...) -> lora_A, lora_B."""
        if not self.num:
            outward = self.form is OUT
            return (OUT if outward else INTO).join(a), (INTO if outward else self.form).join(*bs)
        b = self.form.join(*bs).transpose(2, 1, 0)
        return a.swapaxes(1, 2).reshape(-1, a.shape[1]), b.reshape(len(b), -1)

    def from_disk(self, a: np.ndarray, b: np.ndarray, shapes) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        """The inverse; shapes: of each part of the weight."""
        if not self.num:
            outs = [(len(a), *shape[self.num_in :]) for shape in shapes]
            ours = a.T.reshape(*shapes[0][: self.num_in], len(a))
            return ours, (INTO if self.form is OUT else self.form).split(b, outs)
        ours = a.reshape(self.num, -1, a.shape[1]).swapaxes(1, 2)
        return ours, self.form.split(b.reshape(len(b), -1, self.num).transpose(2, 1, 0), ())

    def fits(self, a: np.ndarray, b: np.ndarray, shapes) -> bool:
        """Whether input and output widths and the rank of a pair on disk can be those of this one."""
        first = 1 if self.num else 0
        num_in = shapes[0][first : first + self.num_in]
        outs = sum(math.prod(shape[first + self.num_in :]) for shape in shapes)
        widths = a.ndim == b.ndim == 2 and (a.shape[1], b.shape) == (math.prod(num_in), (outs, len(a)))
        return widths and len(a) % max(self.num, 1) == 0


def _matrices(cfg: ModelConfig, family: str) -> Iterator[_Pair]:
    for name, place in tensor_map(cfg, family).items():
        leaf = place.parts[0][0]
        if name.endswith(".weight") and leaf.split(".")[-1] in ADAPTABLE and not leaf.startswith("mtp."):
            module = name.removesuffix(".weight")
            yield _Pair(module, module, place.parts, place.form)


def _experts(cfg: ModelConfig, family: str) -> Iterator[tuple[_Pair, _Pair]]:
    """The two parameters of each sparse layer, named as when both are adapted: the first then lies within the second."""
    sparse = [layer for layer, has_experts in enumerate(cfg.sparse_layers) if has_experts]
    for row, layer in enumerate(sparse):
        name = f"model.layers.{layer}.mlp.experts"
        hidden = (("blocks.mlp.gate", (row,)), ("blocks.mlp.up", (row,)))
        joined, num = INTERLEAVED if family == "gpt_oss" else _HALVES, cfg.experts.num_experts
        down = _Pair(f"{name}.down_proj", name, (("blocks.mlp.down", (row,)),), _ALONE, num)
        yield _Pair(f"{name}.gate_up_proj", f"{name}.base_layer", hidden, joined, num), down


def save_adapter(updates: Params, lora: LoRAConfig, cfg: ModelConfig, family: str, folder: str, base: str = "") -> None:
    """Writes the updates of a model of `family` into a new `folder`. base: name or folder of the model, for the reader.

    Raises UserError if two matrices that are one in this format are not both adapted.
    """
    if os.path.exists(folder):
        raise UserError(f"{folder}: exists already; name a new folder")
    flat = _flat(updates)
    pairs, others = _adapted_pairs(flat, cfg, family)
    tensors: dict[str, np.ndarray] = {}
    for pair in pairs:
        for side, value in zip("AB", pair.to_disk(*_joined(pair, flat))):
            tensors[f"{_ROOT}{pair.tensor}.lora_{side}.weight"] = np.ascontiguousarray(value, np.float32)
    ranks = {pair.name.rpartition(".")[2]: lora.rank * len(pair.parts) for pair in pairs if len(pair.parts) > 1}
    with whole_folder(folder) as new:
        save_file(tensors, new / TENSORS, metadata={"format": "pt"})
        write_json_atomic(new / CONFIG, {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
            "bias": "none", "r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": 0.0,
            "rank_pattern": ranks, "alpha_pattern": {name: lora.scale * rank for name, rank in ranks.items()},
            "target_modules": _short({pair.name for pair in pairs if not _as_parameter(pair, cfg)}, others),
            # In this order: the reader wraps the first one first.
            "target_parameters": list(dict.fromkeys(
                f"mlp.experts.{pair.name.rpartition('.')[2]}" if pair.num else f"{pair.name}.weight"
                for pair in pairs if _as_parameter(pair, cfg)
            )),
        })  # fmt: skip


def _as_parameter(pair: _Pair, cfg: ModelConfig) -> bool:
    """Whether PEFT must be told a parameter's name: experts, and in sparse models what is called like experts' matrices,
    because it takes such modules for experts of an older format."""
    return pair.num > 0 or (cfg.moe is not None and pair.name.endswith(("gate_proj", "up_proj", "down_proj")))


def _adapted_pairs(flat: dict[Leaf, LowRank], cfg: ModelConfig, family: str) -> tuple[list[_Pair], set[str]]:
    """The pairs that hold the updates, and the names of the matrices that have none."""
    pairs, others, fused = [], set(), set()
    for layer in _experts(cfg, family):
        wanted = [pair for pair in layer if _is_adapted(pair, flat)]
        if len(wanted) == 1:  # nothing lies within it
            wanted = [dataclasses.replace(wanted[0], tensor=layer[1].tensor)]
        pairs += wanted
        fused |= {leaf for pair in layer for leaf in pair.leaves}
    for pair in _matrices(cfg, family):
        if pair.leaves <= fused:
            continue
        if _is_adapted(pair, flat):
            pairs.append(pair)
        else:
            others.add(pair.name)
    return pairs, others


def _is_adapted(pair: _Pair, flat: dict[Leaf, LowRank]) -> bool:
    missing = pair.leaves - flat.keys()
    if missing and missing != pair.leaves:
        raise UserError(f"{pair.name} is one matrix in this format, so lora.targets must have all of it: {min(missing)} too")
    return not missing


def _joined(pair: _Pair, flat: dict[Leaf, LowRank]) -> tuple[np.ndarray, list[np.ndarray]]:
    """a of all parts side by side; each part's b with zeros for the ranks of the others."""
    own = [(np.asarray(flat[leaf].a[index]), np.asarray(flat[leaf].b[index])) for leaf, index in pair.parts]
    bs = []
    for i, (_, b) in enumerate(own):
        blocks = [b if i == j else np.zeros_like(b) for j in range(len(own))]
        bs.append(np.concatenate(blocks, axis=1 if pair.num else 0))
    return np.concatenate([a for a, _ in own], axis=-1), bs


def _flat(updates: Params) -> dict[Leaf, LowRank]:
    found, _ = jax.tree_util.tree_flatten_with_path(updates, is_leaf=lambda x: isinstance(x, LowRank))
    return {".".join(key.name for key in path): update for path, update in found}


def _short(modules: set[str], others: set[str]) -> list[str]:
    """Last names if they say the same; else whole names."""
    last = {name.rpartition(".")[2] for name in modules}
    return sorted(modules if last & {name.rpartition(".")[2] for name in others} else last)


def load_adapter(folder: str, cfg: ModelConfig, family: str, mesh: Mesh | None = None) -> tuple[Params, LoRAConfig]:
    """The updates in the folder, for `models.lora.merge`, and what they are.

    Ranks that differ are filled up with zeros, and scales are multiplied into b, so alpha = rank = the largest rank. Raises
    UserError for what is not a low-rank update of a matrix of this model, naming it.
    """
    config = read_json(os.path.join(folder, CONFIG))
    for name, allowed in _PLAIN.items():
        if config.get(name, allowed[-1]) not in allowed:
            raise UserError(f"{folder}/{CONFIG}: {name}={config[name]!r} is not supported, only plain LoRA of matrices is")
    shapes = {leaf: spec.shape for leaf, spec in leaves(cfg).items()}
    found = _match(folder, cfg, family, shapes)
    rank = max(len(a) // max(pair.num, 1) for pair, a, _ in found)
    lora = LoRAConfig(rank, float(rank), tuple(sorted(set().union(*(pair.leaves for pair, _, _ in found)))))
    specs = lora_spec(cfg, lora)
    updates = jax.tree.map(lambda spec: np.zeros(spec.shape, np.float32), specs, is_leaf=is_spec)
    flat = _flat(updates)
    for pair, a, b in found:
        a, bs = pair.from_disk(a.astype(np.float32), b.astype(np.float32), _own_shapes(pair, shapes))
        own_rank = a.shape[-1]
        ranks = (slice(None),) * bool(pair.num) + (slice(own_rank),)
        for (leaf, index), b in zip(pair.parts, bs):
            flat[leaf].a[index][..., :own_rank] = a
            flat[leaf].b[index][ranks] = b * _scale(config, pair.name, own_rank)
    return jax.tree.map(jax.device_put, updates, shardings(specs, mesh)), lora


def _own_shapes(pair: _Pair, shapes: dict[Leaf, tuple[int, ...]]) -> list[tuple[int, ...]]:
    return [shapes[leaf][len(index) :] for leaf, index in pair.parts]


def _match(folder: str, cfg: ModelConfig, family: str, shapes) -> list[tuple[_Pair, np.ndarray, np.ndarray]]:
    """Each pair in the file: what it belongs to, lora_A, lora_B."""
    path = os.path.join(folder, TENSORS)
    tensors: dict[str, np.ndarray] = {}
    with open_tensors(path) as archive:
        for name in list(archive.keys()):
            check_dtype(path, name, archive.get_slice(name).get_dtype())
            tensors[name] = archive.get_tensor(name)
    known = {pair.tensor: (pair,) for pair in _matrices(cfg, family)}
    for layer in _experts(cfg, family):
        known |= {pair.tensor: layer for pair in layer}
    found = []
    for name in tensors:
        module, _, side = name.removeprefix(_ROOT).rpartition(".lora_")
        a, b = (tensors.get(f"{_ROOT}{module}.lora_{s}.weight") for s in "AB")
        if module not in known or side not in ("A.weight", "B.weight") or a is None or b is None:
            raise UserError(f"{path}: tensor {name!r} has no place, or no counterpart, in the updates of this model")
        if side == "A.weight":
            fits = [one for one in known[module] if one.fits(a, b, _own_shapes(one, shapes))]
            if not fits:
                raise UserError(f"{path}: {name!r} {list(a.shape)} and its lora_B {list(b.shape)} do not fit")
            found.append((fits[0], a, b))
    if not found:
        raise UserError(f"{path}: holds no update")
    return found


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    """alpha / rank, or alpha / sqrt(rank) where the config says so (arXiv:2312.03732)."""
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)
