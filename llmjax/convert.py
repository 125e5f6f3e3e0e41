"""llmjax-convert --source=... --target=...: Hugging Face folder -> checkpoint, and checkpoint or finished stage -> folder."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from absl import flags

from llmjax.errors import UserError
from llmjax.main import call, parse_flags

USAGE = """llmjax-convert turns models from one form into another; which way follows from what --source is.

  a Hugging Face folder -> a checkpoint:    llmjax-convert --source=models/Qwen3-0.6B --target=models/qwen3
  a checkpoint -> a Hugging Face folder:    llmjax-convert --source=models/qwen3 --target=models/qwen3-hf
  a stage of a run -> such a folder:        llmjax-convert --source=runs/quickstart/ppo --target=models/mine
  a dense one of these -> a sparse folder:  llmjax-convert --source=models/Qwen3-0.6B --target=models/moe --num_experts=8
  any of these + a PEFT adapter -> folder:  llmjax-convert --source=models/Qwen3-0.6B --lora=adapter --target=models/merged
  an SFT stage's LoRA -> a PEFT adapter:    llmjax-convert --source=runs/sft/sft --target=adapter --adapter_only
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
    flags.DEFINE_string("lora", None, "folder of a PEFT adapter, whose updates are added to the model", flag_values=values)
    flags.DEFINE_bool("adapter_only", False, "write a stage's LoRA in PEFT format, not its merged model", flag_values=values)
    flags.DEFINE_integer(
        "num_experts", 0, "upcycle: this many experts, each a copy of the feed-forward layer", flag_values=values
    )  # fmt: skip
    flags.DEFINE_integer("top_k", 2, "upcycle: experts of a token", flag_values=values)
    flags.DEFINE_float("noise", 0.0, "upcycle: added to each copy, relative to the matrix's deviation", flag_values=values)
    flags.DEFINE_float("drop", 0.0, "upcycle: share of the hidden units that each expert draws afresh", flag_values=values)
    flags.DEFINE_integer("seed", 0, "upcycle: of router, noise and drop", flag_values=values)
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
    if values.adapter_only:
        print(_write_adapter(source, target))
        return
    if os.path.exists(os.path.join(source, MODEL_FILE)):
        model = _open_checkpoint(source)
    elif os.path.exists(os.path.join(source, "result.json")):
        model = _open_stage(source)
    elif os.path.exists(os.path.join(source, "config.json")):
        model = _open_folder(source)
        if not (values.num_experts or values.lora):
            print(_write_checkpoint(model, target, values.dtype or model.dtype))
            return
    else:
        raise UserError(f"--source={source}: holds neither config.json, {MODEL_FILE} nor result.json")
    if values.lora:
        model = _with_adapter(model, values.lora)
    if values.num_experts:
        model = _upcycled(model, values)
    print(_write_folder(model, target, values.dtype or model.dtype))


@dataclass(frozen=True)
class Model:
    """What a source holds; the weights are not read before load(dtype).

    raw: the config.json that it came from, or None. dtype: of the numbers in the source. beside: tokenizer files.
    """

    cfg: Any
    load: Callable[[str], Any]
    dtype: str
    raw: dict[str, Any] | None
    beside: list[str]


def _open_folder(source: str) -> Model:
    from llmjax.interop.hf_folder import load_params, read_config

    cfg, raw = read_config(source)
    return Model(cfg, lambda dtype: load_params(source, cfg, raw["model_type"], dtype=dtype), cfg.dtype, raw, _beside(source))


def _open_checkpoint(source: str) -> Model:
    from llmjax.files import read_json
    from llmjax.interop.hf_config import model_config

    path = os.path.join(source, MODEL_FILE)
    about = read_json(path)
    return _stored(source, model_config(about["config"], path), about["dtype"], about["config"], _beside(source))


def _open_stage(source: str) -> Model:
    from llmjax.stages.pipeline import open_run

    workdir, stage = os.path.split(source)
    if stage == "reward":
        raise UserError(f"--source={source}: a reward model ends in a number, which a language model's folder cannot hold")
    return _stored(source, open_run(workdir).model, "float32", None, _beside(os.path.join(workdir, "tokenizer")))


def _stored(source: str, cfg, stored: str, raw: dict[str, Any] | None, beside: list[str]) -> Model:
    """A model whose parameters lie in an Orbax checkpoint below `source`."""
    import jax
    import jax.numpy as jnp

    from llmjax.models.spec import abstract_params
    from llmjax.models.transformer import transformer_spec
    from llmjax.training.checkpoint import load_params

    def load(_dtype: str):
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(stored), sharding=leaf.sharding),
            abstract_params(transformer_spec(cfg)),
        )
        return load_params(os.path.join(source, PARAMS), abstract)

    return Model(cfg, load, stored, raw, beside)


def _with_adapter(model: Model, folder: str) -> Model:
    from llmjax.interop.hf_config import family_of
    from llmjax.interop.peft_folder import load_adapter
    from llmjax.models.lora import merge

    family = model.raw["model_type"] if model.raw else family_of(model.cfg)
    updates, lora = load_adapter(folder, model.cfg, family)
    return replace(model, load=lambda dtype: merge(model.load(dtype), updates, lora, model.cfg))


def _write_adapter(source: str, target: str) -> str:
    from llmjax.interop.hf_config import family_of
    from llmjax.interop.peft_folder import save_adapter
    from llmjax.models.lora import lora_spec
    from llmjax.stages.pipeline import open_run

    workdir, stage = os.path.split(source)
    finished = stage == "sft" and os.path.exists(os.path.join(source, "result.json"))
    run = open_run(workdir) if finished else None
    lora = run.experiment.sft.lora if run else None
    if lora is None:
        raise UserError(f"--source={source}: not a finished SFT stage that was trained with LoRA, so it has no adapter")
    updates = run.load_adapter(stage, lora_spec(run.model, lora))
    family = family_of(run.model)
    save_adapter(updates, lora, run.model, family, target, run.experiment.hf_folder or "")
    return f"{target}: PEFT adapter of rank {lora.rank} for {family}"


def _upcycled(model: Model, values: flags.FlagValues) -> Model:
    import jax

    from llmjax.models.config import MoEConfig
    from llmjax.models.upcycle import upcycle

    moe = MoEConfig(num_experts=values.num_experts, top_k=values.top_k, mlp_dim=model.cfg.mlp_dim)
    moe.validate()
    key, options = jax.random.key(values.seed), dict(noise=values.noise, drop=values.drop)
    params, cfg = upcycle(model.load("float32"), model.cfg, moe, key, **options)
    return Model(cfg, lambda _dtype: params, model.dtype, None, model.beside)


def _write_checkpoint(model: Model, target: str, dtype: str) -> str:
    from llmjax.files import write_json_atomic
    from llmjax.models.stats import total_params
    from llmjax.training.checkpoint import save_params

    save_params(os.path.join(target, PARAMS), model.load(dtype))
    for file in model.beside:
        shutil.copy(file, target)
    # Last: its presence says that the checkpoint is whole.
    write_json_atomic(os.path.join(target, MODEL_FILE), {"dtype": dtype, "config": model.raw})
    return f"{target}: {model.raw['model_type']}, {total_params(model.cfg) / 1e6:,.1f} M parameters, {dtype}"


def _write_folder(model: Model, target: str, dtype: str) -> str:
    from llmjax.interop.hf_config import family_of
    from llmjax.interop.hf_folder import save_params

    family = model.raw["model_type"] if model.raw else family_of(model.cfg)
    save_params(model.load(dtype), model.cfg, family, target, source=model.raw, dtype=dtype, beside=model.beside)
    return f"{target}: {family} in Hugging Face format, {dtype}"


def _beside(folder: str) -> list[str]:
    return [path for name in BESIDE if os.path.exists(path := os.path.join(folder, name))]


def main() -> None:
    """The console command llmjax-convert."""
    call(run, sys.argv)


if __name__ == "__main__":
    main()
