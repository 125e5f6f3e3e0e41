"""llmjax-convert --source=... --target=...: Hugging Face folder -> checkpoint, and checkpoint or finished stage -> folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from absl import flags

from llmjax.commands.base import call, parse_flags
from llmjax.config import validate
from llmjax.errors import UserError
from llmjax.files import read_json, write_json_atomic
from llmjax.results import MODEL_FILE, PARAMS

if TYPE_CHECKING:
    from llmjax.runs.models import LanguageModel

_GENERATION = "generation_config.json"
USAGE = """llmjax-convert turns models from one form into another; which way follows from what --source is.

  a Hugging Face folder -> a checkpoint:    llmjax-convert --source=models/Qwen3-0.6B --target=models/qwen3
  a checkpoint -> a Hugging Face folder:    llmjax-convert --source=models/qwen3 --target=models/qwen3-hf
  a stage of a run -> such a folder:        llmjax-convert --source=runs/quickstart/ppo --target=models/mine
  a dense one of these -> a sparse folder:  llmjax-convert --source=models/Qwen3-0.6B --target=models/moe --num_experts=8
  any of these + a PEFT adapter -> folder:  llmjax-convert --source=models/Qwen3-0.6B --lora=adapter --target=models/merged
  an SFT stage's LoRA -> a PEFT adapter:    llmjax-convert --source=runs/sft/sft --target=adapter --adapter_only
"""


def define_flags() -> flags.FlagValues:
    """The flags of llmjax-convert, with their defaults."""
    values = flags.FlagValues()
    flags.DEFINE_string("source", None, "Hugging Face folder, checkpoint, or folder of a finished stage", flag_values=values)
    flags.DEFINE_string("target", None, "folder to be made", flag_values=values)
    flags.DEFINE_enum(
        "dtype", None, ("float32", "bfloat16", "float16"), "of the numbers in --target; default: as in --source",
        flag_values=values,
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
    if os.path.exists(target):
        raise UserError(f"--target={target}: exists already; name a new folder")
    from llmjax.runs.models import open_model

    try:
        model = open_model(source)
    except UserError as error:
        raise UserError(f"--source={error}") from error
    if values.adapter_only:
        print(_write_adapter(model, source, target))
        return
    from_folder = not os.path.exists(os.path.join(source, MODEL_FILE))
    if from_folder and not (values.num_experts or values.lora):
        print(_write_checkpoint(model, source, target, values.dtype))
        return
    if values.lora:
        model = _with_adapter(model, values.lora)
    if values.num_experts:
        model = _upcycled(model, values)
    print(_write_folder(model, target, values.dtype))


def _with_adapter(model: LanguageModel, folder: str) -> LanguageModel:
    from llmjax.interop.peft_folder import load_adapter
    from llmjax.models.lora import merge

    family = _family(model)
    updates, lora = load_adapter(folder, model.cfg, family)
    return replace(model, load=lambda dtype: merge(model.load(dtype), updates, lora, model.cfg))


def _write_adapter(model: LanguageModel, source: str, target: str) -> str:
    from llmjax.interop.hf_config import family_of
    from llmjax.interop.peft_folder import save_adapter

    if model.lora is None:
        raise UserError(f"--source={source}: not a finished stage that was trained with LoRA, so it has no adapter")
    updates, lora, base = model.lora()
    family = family_of(model.cfg)
    save_adapter(updates, lora, model.cfg, family, target, base)
    return f"{target}: PEFT adapter of rank {lora.rank} for {family}"


def _upcycled(model: LanguageModel, values: flags.FlagValues) -> LanguageModel:
    import jax

    from llmjax.models.config import MoEConfig
    from llmjax.models.upcycle import upcycle

    moe = MoEConfig(num_experts=values.num_experts, top_k=values.top_k, mlp_dim=model.cfg.mlp_dim)
    validate(moe)
    moe.check_router_learns()
    key, options = jax.random.key(values.seed), dict(noise=values.noise, drop=values.drop)
    params, cfg = upcycle(model.load("float32"), model.cfg, moe, key, **options)
    kept = {name: value for name, value in (model.raw or {}).items() if name in _WITH_ANY_FAMILY}
    return replace(model, cfg=cfg, load=lambda _dtype: params, raw=kept, written={"": model.written[""]})


_WITH_ANY_FAMILY = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")


def _family(model: LanguageModel) -> str:
    from llmjax.interop.hf_config import family_of

    return (model.raw or {}).get("model_type") or family_of(model.cfg)


def _write_checkpoint(model: LanguageModel, source: str, target: str, dtype: str | None) -> str:
    from llmjax.interop.hf_folder import copy_beside
    from llmjax.models.stats import total_params
    from llmjax.training.checkpoint import save_params

    dtypes = {"": dtype} if dtype else model.written
    dtype = dtype or model.dtype
    save_params(os.path.join(target, PARAMS), model.load(dtype))
    copy_beside(model.beside, target)
    # Last: its presence says that the checkpoint is whole.
    assert model.raw is not None, "only folders are written as checkpoints"
    about = {"kind": "language", "dtype": dtype, "source": {"folder": source, "config": model.raw, "dtypes": dtypes}}
    write_json_atomic(os.path.join(target, MODEL_FILE), about)
    return f"{target}: {model.raw['model_type']}, {total_params(model.cfg) / 1e6:,.1f} M parameters, {dtype}"


def _write_folder(model: LanguageModel, target: str, dtype: str | None) -> str:
    from llmjax.interop.hf_folder import save_params

    family, dtypes = _family(model), {"": dtype} if dtype else model.written
    save_params(
        model.load(model.dtype), model.cfg, family, target, source=model.raw, dtypes=dtypes, beside=model.beside,
        token_ids=_token_ids(model),
    )  # fmt: skip
    return f"{target}: {family} in Hugging Face format, {dtypes['']}"


def _token_ids(model: LanguageModel) -> dict[str, int | list[int]] | None:
    """What generation must know of the tokenizer: where training has taught the model to stop, and, where there is a tokenizer
    whose folder says nothing of that, all its ids."""
    files = {os.path.basename(path): path for path in model.beside}
    if not any(name.startswith(("tokenizer", "vocab")) for name in files):
        return None
    known = [model.raw or {}, read_json(files[_GENERATION]) if _GENERATION in files else {}]
    said = any(config.get("eos_token_id") is not None for config in known)
    if said and not model.trained:
        return None
    tokenizer = model.tokenizer()
    if said:
        return {"eos_token_id": sorted({tokenizer.end_of_turn_id, tokenizer.eos_id})}
    return {
        "bos_token_id": tokenizer.bos_id, "eos_token_id": list(tokenizer.stop_ids), "pad_token_id": tokenizer.pad_id
    }  # fmt: skip


def main() -> None:
    """The console command llmjax-convert."""
    call(run, sys.argv)


if __name__ == "__main__":
    main()
