"""llmjax-convert --source=... --target=...: Hugging Face folder -> checkpoint, and checkpoint or finished stage -> folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from llmjax.errors import UserError
from llmjax.main import call, parse_flags

USAGE = """llmjax-convert turns models from one form into another; which way follows from what --source is.

  a Hugging Face folder -> a checkpoint:    llmjax-convert --source=models/Qwen3-0.6B --target=models/qwen3
  a checkpoint -> a Hugging Face folder:    llmjax-convert --source=models/qwen3 --target=models/qwen3-hf
  a stage of a run -> such a folder:        llmjax-convert --source=runs/quickstart/ppo --target=models/mine
"""
MODEL_FILE, PARAMS = "model.json", "params"
# What a Hugging Face folder holds beside weights and config.json.
BESIDE = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json",
    "tokenizer.model", "vocab.json", "merges.txt",
)  # fmt: skip


def define_flags() -> flags.FlagValues:
    """The flags of llmjax-convert, with their defaults."""
    values = flags.FlagValues()
    flags.DEFINE_string("source", None, "Hugging Face folder, checkpoint, or folder of a finished stage", flag_values=values)
    flags.DEFINE_string("target", None, "folder to be made", flag_values=values)
    flags.DEFINE_enum(
        "dtype", None, ("float32", "bfloat16"), "of the numbers in --target; default: as in --source", flag_values=values
    )  # fmt: skip
    flags.DEFINE_bool("help", False, "show this help", flag_values=values)
    return values


def run(argv: Sequence[str]) -> None:
    """The program, without the handling of errors."""
    values = define_flags()
    parse_flags(argv, values, USAGE)
    for name in ("source", "target"):
        if not values[name].value:
            raise UserError(f"--{name} is missing; --help shows examples")
    source, target = (os.path.normpath(path) for path in (values.source, values.target))
    if not os.path.isdir(source):
        raise UserError(f"--source={source}: no such folder")
    if os.path.exists(target):
        raise UserError(f"--target={target}: exists already; name a new folder")
    if os.path.exists(os.path.join(source, MODEL_FILE)):
        done = _export_checkpoint(source, target, values.dtype)
    elif os.path.exists(os.path.join(source, "result.json")):
        done = _export_stage(source, target, values.dtype)
    elif os.path.exists(os.path.join(source, "config.json")):
        done = _import(source, target, values.dtype)
    else:
        raise UserError(f"--source={source}: holds neither config.json, {MODEL_FILE} nor result.json")
    print(done)


def _import(source: str, target: str, dtype: str | None) -> str:
    import shutil

    from llmjax.files import write_json_atomic
    from llmjax.interop.hf_folder import load_params, read_config
    from llmjax.models.stats import total_params
    from llmjax.training.checkpoint import save_params

    cfg, raw = read_config(source)
    dtype = dtype or cfg.dtype
    save_params(os.path.join(target, PARAMS), load_params(source, cfg, raw["model_type"], dtype=dtype))
    for file in _beside(source):
        shutil.copy(file, target)
    # Last: its presence says that the checkpoint is whole.
    write_json_atomic(os.path.join(target, MODEL_FILE), {"dtype": dtype, "config": raw})
    return f"{target}: {raw['model_type']}, {total_params(cfg) / 1e6:,.1f} M parameters, {dtype}"


def _export_checkpoint(source: str, target: str, dtype: str | None) -> str:
    from llmjax.files import read_json
    from llmjax.interop.hf_config import model_config

    path = os.path.join(source, MODEL_FILE)
    about = read_json(path)
    cfg, family = model_config(about["config"], path), about["config"]["model_type"]
    stored = about["dtype"]
    return _export(os.path.join(source, PARAMS), cfg, family, target, dtype or stored, stored, about["config"], _beside(source))


def _export_stage(source: str, target: str, dtype: str | None) -> str:
    from llmjax.interop.hf_config import family_of
    from llmjax.stages.pipeline import open_run

    workdir, stage = os.path.split(source)
    if stage == "reward":
        raise UserError(f"--source={source}: a reward model ends in a number, which a language model's folder cannot hold")
    cfg = open_run(workdir).model
    tokenizer = _beside(os.path.join(workdir, "tokenizer"))
    return _export(os.path.join(source, PARAMS), cfg, family_of(cfg), target, dtype or "float32", "float32", None, tokenizer)


def _export(params: str, cfg, family: str, target: str, dtype: str, stored: str, raw: dict[str, Any] | None, beside) -> str:
    import jax
    import jax.numpy as jnp

    from llmjax.interop.hf_folder import save_params
    from llmjax.models.spec import abstract_params
    from llmjax.models.transformer import transformer_spec
    from llmjax.training.checkpoint import load_params

    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(stored), sharding=leaf.sharding),
        abstract_params(transformer_spec(cfg)),
    )
    save_params(load_params(params, abstract), cfg, family, target, source=raw, dtype=dtype, beside=beside)
    return f"{target}: {family} in Hugging Face format, {dtype}"


def _beside(folder: str) -> list[str]:
    return [path for name in BESIDE if os.path.exists(path := os.path.join(folder, name))]


def main() -> None:
    """The console command llmjax-convert."""
    call(run, sys.argv)


if __name__ == "__main__":
    main()
