"""A Hugging Face folder (config.json, sharded safetensors) in and out, one leaf or one shard in memory at a time."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
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
_DTYPES = {
    "float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16),
}  # fmt: skip
_READ = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float32"}
"""What a tensor may be in a file, and what it becomes."""
_HEAD, _EMBED = "lm_head.weight", "model.embed_tokens.weight"
_ROWS = 4096  # of a table in memory at a time
_TEMPLATES = "additional_chat_templates"
_WEIGHTS = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx",
)  # fmt: skip


def read_config(folder: str) -> tuple[ModelConfig, dict[str, Any]]:
    """The model's config, and config.json as it stands there but for what the folder does not hold."""
    path = os.path.join(folder, "config.json")
    raw = read_json(path)
    # Some folders name modules for multi-token prediction without holding them.
    if raw.get("num_nextn_predict_layers") and not any(name.endswith(".eh_proj.weight") for name in _names(folder)):
        raw["num_nextn_predict_layers"] = 0
    try:
        cfg = model_config(raw, path)
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]!r} is missing, which model_type={raw.get('model_type')!r} needs") from error
    # Others say that the head is the embedding and hold another one.
    if cfg.tie_embeddings and _HEAD in _names(folder) and not _equal(folder, _HEAD, _EMBED):
        raw["tie_word_embeddings"], cfg = False, replace(cfg, tie_embeddings=False)
    return cfg, raw


def read_dtypes(folder: str) -> dict[str, str]:
    """The dtypes of the numbers in the files: that of most tensors under "", and those of the others by name."""
    found = {name: _READ.get(dtype, "float32") for name, (_, _, dtype) in _headers(folder).items()}
    most = Counter(found.values()).most_common(1)[0][0] if found else "float32"
    return {"": most} | {name: dtype for name, dtype in found.items() if dtype != most}


def beside(folder: str) -> list[str]:
    """What stands in a folder beside config.json and the weights: tokenizer, templates, generation_config.json, licence ..."""
    entries = os.scandir(folder) if os.path.isdir(folder) else ()
    names = [entry.name for entry in entries if entry.is_file() and not entry.name.startswith(".")]
    kept = sorted(name for name in names if name != "config.json" and not name.endswith(_WEIGHTS))
    if os.path.isdir(os.path.join(folder, _TEMPLATES)):
        kept.append(_TEMPLATES)
    return [os.path.join(folder, name) for name in kept]


def copy_beside(files: Sequence[str], folder: str | os.PathLike) -> None:
    """Copies what `beside` names into `folder`."""
    for file in files:
        if os.path.isdir(file):
            shutil.copytree(file, os.path.join(folder, os.path.basename(file)))
        else:
            shutil.copy(file, folder)


def _equal(folder: str, name: str, other: str) -> bool:
    """Whether two tensors of a folder hold the same numbers; a block of rows in memory at a time."""
    headers = _headers(folder)
    if name not in headers or other not in headers or headers[name][1:] != headers[other][1:]:
        return False
    if headers[name][2] not in _READ:  # `locate_tensors` refuses it
        return False
    with open_tensors(headers[name][0]) as first, open_tensors(headers[other][0]) as second:
        one, two, rows = first.get_slice(name), second.get_slice(other), headers[name][1][0]
        blocks = (slice(start, min(start + _ROWS, rows)) for start in range(0, rows, _ROWS))
        return all(np.array_equal(one[block], two[block]) for block in blocks)


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
    """Tensor -> file, after every name, shape and dtype was compared with what the config asks for; reads no weight but those
    that are copies of others."""
    specs, places = leaves(cfg), tensor_map(cfg, family)
    found = _headers(folder)
    for name, (file, _, dtype) in found.items():
        if not _may_be_left(name, cfg):
            check_dtype(file, name, dtype)
    for name in places:
        if name not in found and not is_copy(name):
            raise UserError(f"{folder}: tensor {name!r} is missing; config.json asks for it")
    for name, (file, shape, _) in found.items():
        if name in places:
            want = disk_shape(places[name], specs)
            if shape != want:
                raise UserError(f"{file}: tensor {name!r} has shape {list(shape)}; config.json asks for {list(want)}")
        elif not _may_be_left(name, cfg):
            raise UserError(f"{file}: tensor {name!r} has no place in the model that config.json describes")
    for name in filter(is_copy, found.keys() & places.keys()):
        original = next(other for other, place in places.items() if place.parts == places[name].parts)
        if not _equal(folder, name, original):
            raise UserError(f"{found[name][0]}: tensor {name!r} must be a copy of {original!r}, and is not equal to it")
    return {name: file for name, (file, *_) in found.items()}


def check_dtype(file: str, name: str, dtype: str) -> None:
    """UserError for a dtype, as safetensors calls it, of which plain numbers cannot be made: those of quantized weights."""
    if dtype not in _READ:
        raise UserError(f"{file}: tensor {name!r} is of dtype {dtype}; convert it to one of {', '.join(_READ)} first")


def _headers(folder: str) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """File, shape and dtype of every tensor, from the headers of the files alone."""
    found = {}
    for file in sorted(set(_locate(folder).values())):
        with open_tensors(file) as archive:
            for name in list(archive.keys()):
                header = archive.get_slice(name)
                found[name] = file, tuple(header.get_shape()), header.get_dtype()
    return found


def _may_be_left(name: str, cfg: ModelConfig) -> bool:
    """Tensors that carry nothing: heads equal to the embedding (see `read_config`) and computed tables."""
    tied = cfg.tie_embeddings and name == _HEAD
    return tied or name.endswith("rotary_emb.inv_freq")


@contextlib.contextmanager
def open_tensors(file: str) -> Iterator[Any]:
    """A safetensors file. UserError if it cannot be read."""
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
    with open_tensors(files[""]) as archive:
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
    dtypes: Mapping[str, str] = MappingProxyType({"": "float32"}),
    shard_bytes: int = 2**31,
    beside: Sequence[str] = (),
    token_ids: Mapping[str, Any] | None = None,
) -> None:
    """Writes config.json, safetensors of at most `shard_bytes` each and the files of `beside` into a new `folder`.

    source: the config.json that the model came from. dtypes: as from `read_dtypes`. token_ids: bos_token_id, eos_token_id (a
    list) and pad_token_id, which config.json and generation_config.json then name, so that others stop where this library
    does: what these files say already stays, and only ends that are missing are added. Each shard is read back and compared;
    the folder is there whole or not at all. UserError if the family cannot express this model.
    """
    if os.path.exists(folder):
        raise UserError(f"{folder}: exists already; name a new folder")
    config = _with_ids(hf_config(cfg, family, source), token_ids or {})
    config |= {name: dtypes[""] for name in ("dtype", "torch_dtype") if name in config}
    specs, places = leaves(cfg), tensor_map(cfg, family)
    flat = dict(zip(specs, jax.tree.leaves(params), strict=True))
    kinds = {name: _DTYPES[dtypes.get(name, dtypes[""])] for name in places}
    groups, total = _shard_groups(places, specs, kinds, shard_bytes)
    weight_map = {}
    with whole_folder(folder) as new:
        for number, names in enumerate(groups, 1):
            file = _SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            tensors = {name: _disk_tensor(places[name], flat, kinds[name]) for name in names}
            save_file(tensors, new / file, metadata={"format": "pt"})
            _read_back(new / file, tensors)
            weight_map |= dict.fromkeys(names, file)
        if len(groups) > 1:
            write_json_atomic(new / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        write_json_atomic(new / "config.json", config)
        copy_beside(beside, new)
        if token_ids:
            write_json_atomic(new / _GENERATION, _with_ids(_generation(new / _GENERATION, config), token_ids))


def _generation(path: pathlib.Path, config: dict[str, Any]) -> dict[str, Any]:
    """generation_config.json, or where there is none, what config.json says in its place."""
    if path.exists():
        return read_json(path)
    return {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(name) is not None}


def _with_ids(config: dict[str, Any], ids: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the ids that it lacks."""
    out = config | {name: value for name, value in ids.items() if config.get(name) is None}
    known, ends = out.get("eos_token_id"), set(ids.get("eos_token_id", ()))
    known = set(known if isinstance(known, list) else [known])
    return out if ends <= known else out | {"eos_token_id": sorted(ends | known)}


def _shard_groups(places, specs, kinds: Mapping[str, np.dtype], shard_bytes: int) -> tuple[list[list[str]], int]:
    groups: list[list[str]] = [[]]
    filled = total = 0
    for name, place in places.items():
        size = int(np.prod(disk_shape(place, specs), dtype=np.int64)) * kinds[name].itemsize
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
