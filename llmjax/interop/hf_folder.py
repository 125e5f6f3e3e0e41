"""A Hugging Face folder (config.json, sharded safetensors) in and out, one leaf or one shard in memory at a time."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_dtypes  # also teaches numpy, and with it safetensors, the name bfloat16
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from llmjax.errors import UserError
from llmjax.files import read_json, whole_folder, write_json_atomic
from llmjax.interop.hf_config import hf_config, model_config
from llmjax.interop.hf_tensors import Leaf, Place, disk_shape, is_copy, leaves, tensor_map
from llmjax.models.config import ModelConfig
from llmjax.models.spec import shardings
from llmjax.models.transformer import Params, transformer_spec

_GENERATION = "generation_config.json"
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def read_config(folder: str) -> tuple[ModelConfig, dict[str, Any]]:
    """The model's config, and config.json as it stands there but for what the folder does not hold."""
    path = os.path.join(folder, "config.json")
    raw = read_json(path)
    # Some folders name modules for multi-token prediction without holding them.
    if raw.get("num_nextn_predict_layers") and not any(name.endswith(".eh_proj.weight") for name in _names(folder)):
        raw["num_nextn_predict_layers"] = 0
    try:
        return model_config(raw, path), raw
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]!r} is missing, which model_type={raw.get('model_type')!r} needs") from error


def load_params(folder: str, cfg: ModelConfig, family: str, mesh: Mesh | None = None, dtype: str = "float32") -> Params:
    """The parameters in the folder, in `dtype`, straight onto their places.

    A leaf is read at a time, and of it only what this process's devices hold. Raises UserError, before anything is
    read, for a tensor that is missing, superfluous or of another shape.
    """
    specs, places = leaves(cfg), tensor_map(cfg, family)
    files = locate_tensors(folder, cfg, family)
    by_leaf: dict[Leaf, list[tuple[tuple[int, ...], str, int]]] = {leaf: [] for leaf in specs}
    for name, place in places.items():
        for part, (leaf, index) in enumerate(() if is_copy(name) else place.parts):
            by_leaf[leaf].append((index, name, part))

    def load(leaf: Leaf, target) -> jax.Array:
        shape = specs[leaf].shape

        def fetch(where: tuple[slice, ...] | None) -> np.ndarray:
            assert where is not None
            return _assemble(where, shape, by_leaf[leaf], places, specs, files, _DTYPES[dtype])

        return jax.make_array_from_callback(shape, target, fetch)

    targets = jax.tree.leaves(shardings(transformer_spec(cfg), mesh))
    loaded = []
    for leaf, target in zip(specs, targets, strict=True):
        loaded.append(jax.block_until_ready(load(leaf, target)))
    return jax.tree.unflatten(jax.tree.structure(shardings(transformer_spec(cfg), mesh)), loaded)


def _assemble(where, shape, entries, places: dict[str, Place], specs, files, dtype) -> np.ndarray:
    """The part `where` of one leaf, from the tensors that touch it."""
    ranges = [range(*axis.indices(size)) for axis, size in zip(where, shape)]
    out = _aligned([len(r) for r in ranges], dtype)
    wanted = [e for e in entries if all(i in r for i, r in zip(e[0], ranges))]
    for file in sorted({files[name] for _, name, _ in wanted}):
        with safe_open(file, framework="np") as archive:
            for index, name, part in wanted:
                if files[name] != file:
                    continue
                shapes = tuple(specs[leaf].shape[len(i) :] for leaf, i in places[name].parts)
                value = places[name].form.split(archive.get_tensor(name), shapes)[part]
                here = tuple(i - r.start for i, r in zip(index, ranges))
                out[here] = value[tuple(where[len(index) :])]
    return out


def _aligned(shape, dtype) -> np.ndarray:
    """Uninitialised memory on a 64-byte boundary, which a CPU device takes over instead of copying."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def locate_tensors(folder: str, cfg: ModelConfig, family: str) -> dict[str, str]:
    """Tensor -> file, after every name and shape was compared with what the config asks for; reads no weight."""
    specs, places = leaves(cfg), tensor_map(cfg, family)
    files = _locate(folder)
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in sorted(set(files.values())):
        with _open(file) as archive:
            for name in list(archive.keys()):
                found[name] = file, tuple(archive.get_slice(name).get_shape())
    for name in places:
        if name not in found and not is_copy(name):
            raise UserError(f"{folder}: tensor {name!r} is missing; config.json asks for it")
    for name, (file, shape) in found.items():
        if name in places:
            want = disk_shape(places[name], specs)
            if shape != want:
                raise UserError(f"{file}: tensor {name!r} has shape {list(shape)}; config.json asks for {list(want)}")
        elif not _may_be_left(name, cfg):
            raise UserError(f"{file}: tensor {name!r} has no place in the model that config.json describes")
    return {name: file for name, (file, _) in found.items()}


def _may_be_left(name: str, cfg: ModelConfig) -> bool:
    """Tensors that carry nothing: tied heads and computed tables."""
    tied = cfg.tie_embeddings and name == "lm_head.weight"
    return tied or name.endswith("rotary_emb.inv_freq")


@contextlib.contextmanager
def _open(file: str) -> Iterator[Any]:
    try:
        with safe_open(file, framework="np") as archive:
            yield archive
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a readable safetensors file ({error})") from error


def _names(folder: str) -> set[str]:
    """Tensors that the index names, or the only file."""
    files = _locate(folder)
    if "" not in files:
        return set(files)
    with _open(files[""]) as archive:
        return set(archive.keys())


def _locate(folder: str) -> dict[str, str]:
    index = os.path.join(folder, _INDEX)
    if os.path.exists(index):
        return {name: os.path.join(folder, file) for name, file in read_json(index)["weight_map"].items()}
    single = os.path.join(folder, _SINGLE)
    if not os.path.exists(single):
        raise UserError(f"{folder}: holds neither {_INDEX} nor {_SINGLE}")
    return {"": single}


def save_params(
    params: Params,
    cfg: ModelConfig,
    family: str,
    folder: str,
    *,
    source: dict[str, Any] | None = None,
    dtype: str = "float32",
    shard_bytes: int = 2**31,
    beside: Sequence[str] = (),
    token_ids: Mapping[str, Any] | None = None,
) -> None:
    """Writes config.json, safetensors of at most `shard_bytes` each and the files of `beside` into a new `folder`.

    source: the config.json that the model came from. token_ids: bos_token_id, eos_token_id (one or several) and pad_token_id,
    which config.json and generation_config.json then name, so that others stop where this library does. Each shard is read
    back and compared; the folder is there whole or not at all. UserError if the family cannot express this model.
    """
    if os.path.exists(folder):
        raise UserError(f"{folder}: exists already; name a new folder")
    config = hf_config(cfg, family, source) | {"dtype": dtype, "torch_dtype": dtype} | dict(token_ids or {})
    specs, places = leaves(cfg), tensor_map(cfg, family)
    flat = dict(zip(specs, jax.tree.leaves(params), strict=True))
    groups, total = _shard_groups(places, specs, _DTYPES[dtype].itemsize, shard_bytes)
    weight_map = {}
    with whole_folder(folder) as new:
        for number, names in enumerate(groups, 1):
            file = _SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            tensors = {name: _disk_tensor(places[name], flat, _DTYPES[dtype]) for name in names}
            save_file(tensors, new / file, metadata={"format": "pt"})
            _read_back(new / file, tensors)
            weight_map |= dict.fromkeys(names, file)
        if len(groups) > 1:
            write_json_atomic(new / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        write_json_atomic(new / "config.json", config)
        for file in beside:
            shutil.copy(file, new)
        if token_ids and not (new / _GENERATION).exists():
            write_json_atomic(new / _GENERATION, dict(token_ids))


def _shard_groups(places, specs, itemsize: int, shard_bytes: int) -> tuple[list[list[str]], int]:
    groups: list[list[str]] = [[]]
    filled = total = 0
    for name, place in places.items():
        size = int(np.prod(disk_shape(place, specs), dtype=np.int64)) * itemsize
        if groups[-1] and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
        total += size
    return groups, total


def _disk_tensor(place: Place, flat: dict[Leaf, jax.Array], dtype) -> np.ndarray:
    parts = [np.asarray(flat[leaf][index]).astype(dtype) for leaf, index in place.parts]
    # safetensors writes the bytes of a view as they lie: only a contiguous array comes out right.
    return np.ascontiguousarray(place.form.join(*parts))


def _read_back(path: os.PathLike, tensors: dict[str, np.ndarray]) -> None:
    with safe_open(path, framework="np") as archive:
        for name, value in tensors.items():
            if not np.array_equal(archive.get_tensor(name).view(np.uint8), value.view(np.uint8)):
                raise RuntimeError(f"{path}: tensor {name!r} does not read back as it was written")
