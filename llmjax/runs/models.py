"""Language models wherever they lie: a finished stage of a run, a converted checkpoint, a Hugging Face folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from llmjax.config import from_dict, to_dict
from llmjax.data.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.files import read_json, write_json_atomic
from llmjax.interop import hf_folder
from llmjax.interop.hf_config import model_config
from llmjax.interop.hf_tokenizer import has_chat_template, read_tokenizer
from llmjax.models.config import ModelConfig
from llmjax.models.lora import LoRAConfig, lora_spec
from llmjax.models.spec import abstract_params
from llmjax.models.transformer import Params, transformer_spec
from llmjax.results import ADAPTER, MODEL_FILE, PARAMS, RESULT_FILE
from llmjax.runs.workdir import CONFIG, SOURCE, TOKENIZER
from llmjax.stages.base import HF
from llmjax.training import checkpoint


@dataclass(frozen=True)
class LanguageModel:
    """A language model in a folder; nothing large is read before it is asked for.

    load: load(dtype) gives the parameters. dtype: one that holds the numbers in the folder without loss. tokenizer: gives its
    tokenizer. raw: the config.json of the Hugging Face folder that it comes from, None for a model that began here. beside:
    what belongs to it beside config.json and weights. written: dtypes of the tensors of a folder that is made of it, as from
    `hf_folder.read_dtypes`. chats: whether it has learnt to answer; a base model has not. length: of the longest texts that it
    was trained on, in tokens; 0 where that is not known. trained: whether a stage of a run has made it. lora: gives the
    low-rank updates that are in a stage's parameters, their config and the folder of the model that they were added to; None
    for other models.
    """

    cfg: ModelConfig
    load: Callable[[str], Params]
    dtype: str
    tokenizer: Callable[[], Tokenizer]
    raw: dict[str, Any] | None
    beside: list[str]
    written: dict[str, str]
    chats: bool
    length: int
    trained: bool = False
    lora: Callable[[], tuple[Params, LoRAConfig, str]] | None = None


def write_model_file(
    folder: str, kind: str, cfg: ModelConfig, hf_source: str | None, adapter: LoRAConfig | None = None, *,
    chats: bool, length: int,
) -> None:
    """Writes `folder`/model.json: what the parameters in this folder of a stage are, for `open_model`.

    kind: "language" or "scalar". hf_source: the Hugging Face folder that the experiment's model comes from. chats, length: as
    in `LanguageModel`.
    """
    source = None
    if hf_source:
        config, dtypes = hf_folder.read_config(hf_source)[1], hf_folder.read_dtypes(hf_source)
        source = {"folder": hf_source, "config": config, "dtypes": dtypes}
    about = {"kind": kind, "dtype": "float32", "model": to_dict(cfg), "source": source, "chats": chats, "length": length}
    lora = {"lora": to_dict(adapter)} if adapter is not None else {}
    write_json_atomic(os.path.join(folder, MODEL_FILE), about | lora)


def open_model(folder: str) -> LanguageModel:
    """The model in a Hugging Face folder, in a checkpoint that llmjax-convert has made, or in the folder of a finished stage.

    Raises UserError if there is none, or one that is no language model.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder")
    if os.path.exists(os.path.join(folder, MODEL_FILE)):
        return _open_saved(folder)
    path = os.path.join(folder, CONFIG)
    if not os.path.exists(path):
        raise UserError(f"{folder}: holds neither {CONFIG}, of a Hugging Face model, nor {MODEL_FILE}, of a finished stage")
    if "stages" in read_json(path):
        there = ", ".join(os.path.join(folder, name) for name in finished(folder)) or "none is finished yet"
        raise UserError(f"{folder}: the folder of a run, not of a model; name one of its stages ({there})")
    cfg, raw = hf_folder.read_config(folder)

    def load(dtype: str) -> Params:
        return hf_folder.load_params(folder, cfg, raw["model_type"], dtype=dtype)

    dtypes = hf_folder.read_dtypes(folder)
    dtype = dtypes[""] if len(dtypes) == 1 else "float32"
    return LanguageModel(
        cfg, load, dtype, lambda: read_tokenizer(folder), raw, hf_folder.beside(folder), dtypes, has_chat_template(folder),
        _longest(raw),
    )  # fmt: skip


def _open_saved(folder: str) -> LanguageModel:
    """A model whose parameters lie in an Orbax checkpoint below `folder`: a stage's, which has a config of its own, or a
    converted one's, whose config is that of its source."""
    path, about = os.path.join(folder, MODEL_FILE), _about(folder)
    if about["kind"] != "language":
        raise UserError(f"{folder}: a {about['kind']} model, which gives numbers and no text; name a language model")
    source = about.get("source") or {}
    raw: Any = source.get("config")
    of_stage = "model" in about
    if of_stage and not os.path.exists(os.path.join(folder, RESULT_FILE)):
        raise UserError(f"{folder}: this stage is not complete; run its experiment again to finish it")
    try:
        cfg = from_dict(ModelConfig, about["model"]) if of_stage else model_config(raw, path)
        lora = from_dict(LoRAConfig, about["lora"]) if "lora" in about else None
    except (KeyError, TypeError, AttributeError, UserError) as error:
        raise UserError(f"{path}: {_broken(error)}") from error
    workdir = os.path.dirname(os.path.abspath(folder))
    tokens = os.path.join(workdir, TOKENIZER) if of_stage else folder
    files = [path for path in hf_folder.beside(tokens) if os.path.basename(path) != MODEL_FILE]
    if of_stage and os.path.isdir(origin := os.path.join(workdir, SOURCE)):
        files = hf_folder.beside(origin)

    def load(name: str, specs: Any, dtype: str) -> Any:
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=leaf.sharding), abstract_params(specs)
        )
        return checkpoint.load_params(os.path.join(folder, name), abstract)

    def updates() -> tuple[Params, LoRAConfig, str]:
        assert lora is not None
        return load(ADAPTER, lora_spec(cfg, lora), "float32"), lora, source.get("folder") or ""

    return LanguageModel(
        cfg, lambda dtype: load(PARAMS, transformer_spec(cfg), dtype), about["dtype"],
        lambda: Tokenizer.load(tokens) if of_stage else read_tokenizer(tokens, raw), raw, files,
        source.get("dtypes") or {"": about["dtype"]},
        about.get("chats", True) if of_stage else has_chat_template(folder),
        about.get("length", 0) if of_stage else _longest(raw),
        of_stage, updates if lora is not None else None,
    )  # fmt: skip


def _longest(raw: dict[str, Any]) -> int:
    """The length that a config.json names."""
    return int(raw.get("max_position_embeddings") or 0)


def trained_length(workdir: str, source: str) -> int:
    """`LanguageModel.length` of what a stage starts from: a finished stage of the run, or "hf:FOLDER"."""
    if source.startswith(HF):
        return _longest(hf_folder.read_config(source.removeprefix(HF))[1])
    return _about(os.path.join(workdir, source)).get("length", 0)


def open_stage(workdir: str, stage: str = "") -> tuple[str, LanguageModel]:
    """Name and model of a finished stage of a run, by default of the last in the experiment that makes a language model."""
    if not os.path.isdir(workdir):
        raise UserError(f"--workdir={workdir}: no such folder")
    there = finished(workdir)
    if not there or (stage and stage not in there):
        which, known = stage or "of a language model", ", ".join(there) or "none"
        raise UserError(f"--workdir={workdir}: stage {which} is not complete there; there is {known}")
    name = stage or there[-1]
    return name, open_model(os.path.join(workdir, name))


def finished(workdir: str) -> list[str]:
    """The complete stages of a run that have made a language model, in the order of its config; without one in that of time."""
    results = {name: os.path.join(workdir, name, RESULT_FILE) for name in os.listdir(workdir)}
    there = [name for name, path in results.items() if os.path.exists(path)]
    by_time = sorted(there, key=lambda name: os.stat(results[name]).st_mtime)
    path = os.path.join(workdir, CONFIG)
    config = read_json(path) if os.path.exists(path) else {}
    planned = list(config.get("stages", {})) if isinstance(config, dict) else []
    done = [*(name for name in by_time if name not in planned), *(name for name in planned if name in by_time)]
    models = [name for name in done if os.path.exists(os.path.join(workdir, name, MODEL_FILE))]
    return [name for name in models if _about(os.path.join(workdir, name))["kind"] == "language"]


def _about(folder: str) -> dict[str, Any]:
    """What model.json says, which has at least kind and dtype."""
    path = os.path.join(folder, MODEL_FILE)
    about = read_json(path)
    if not isinstance(about, dict) or about.get("kind") not in ("language", "scalar") or "dtype" not in about:
        raise UserError(f"{path}: {_broken('no kind and dtype')}")
    return about


def _broken(reason: object) -> str:
    return f"does not say what the model is ({reason}); restore the file or make the model again"
