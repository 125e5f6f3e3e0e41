"""Dense against sparse: the whole life at equal active parameters, or pre-training alone with something else held equal.

    llmjax --config=experiments/dense_vs_moe.py --workdir=runs/dense_vs_moe             (all stages, equal active parameters)
    llmjax --config=experiments/dense_vs_moe.py:matched_active --workdir=runs/active    (equal active parameters, equal tokens)
    llmjax --config=experiments/dense_vs_moe.py:matched_flops --workdir=runs/flops      (equal training FLOPs)
    llmjax --config=experiments/dense_vs_moe.py:matched_total --workdir=runs/total      (equal parameters in all, equal tokens)
    llmjax --config=experiments/dense_vs_moe.py:granularity --workdir=runs/granularity  (one width in 1, 2, 4, 8 pieces)
    llmjax --config=experiments/dense_vs_moe.py:experts --workdir=runs/experts          (2 of 4, 8, 16, 32 experts)
    llmjax --config=experiments/dense_vs_moe.py:test --workdir=runs/test                (seconds a run; what the tests run)

The others in test size: `:matched_active,test` and so on. An override changes all runs, or the one that it names:

    --config.pretrain.steps=700         in all
    --config.moe.pretrain.steps=700     in the run `moe` only; --config.dense.pretrain.steps=700 in the dense one
    --config.model.moe.top_k=4          where there are experts

Expected: a table of all runs, stage by stage, on the terminal and in report.html; each run's own report is in its folder,
runs/dense_vs_moe/dense and runs/dense_vs_moe/moe. Where there are experts, the table says what they bring (loss at equal
training FLOPs, efficiency leverage over the dense run) and how evenly they are used.

Of the default the README has figures of runs that differ in pre-training. Those of the others were measured in the first
version of the world and have not been repeated in the present one. `matched_active`, seed 0: 0.202 / 0.183 bits per byte,
0.541 / 0.491 nats per token at equal FLOPs, efficiency leverage 1.27, busiest expert 1.33 times the uniform load.
`matched_flops`, dense / moe / wide / fine: 0.202 / 0.183 / 0.220 / 0.172 bits per byte, leverage 1.26 / 0.78 / 1.37 for the
last three. `matched_total`: 0.175 / 0.183 bits per byte, the second for 0.38 of the FLOPs (leverage 2.29). `granularity`,
dense / g1 / g2 / g4 / g8: 0.202 / 0.186 / 0.180 / 0.180 / 0.181 bits per byte, leverage 1.21 / 1.29 / 1.29 / 1.26 for the
last four. `experts`, dense / e4 / e8 / e16 / e32: 0.202 / 0.194 / 0.184 / 0.177 / 0.175 bits per byte, leverage 1.10 / 1.27 /
1.34 / 1.32 for the last four, busiest expert 1.3 / 1.4 / 2.3 / 2.7 times the uniform load. Hardware: 2 CPU cores, about the
time of two quickstarts; for the others one to a few minutes a run.
"""

from dataclasses import replace
from typing import Literal

from experiments import quickstart
from llmjax.models.config import ModelConfig, MoEConfig
from llmjax.models.stats import steps_for_flops, train_flops_per_token
from llmjax.stages.experiment import Experiment, Study
from llmjax.stages.pretrain import Pretrain

Variant = Literal[
    "quickstart", "test", "matched_active", "matched_flops", "matched_total", "granularity", "experts",
    "matched_active,test", "matched_flops,test", "matched_total,test", "granularity,test", "experts,test",
]  # fmt: skip


def get_config(arg: Variant = "quickstart") -> Study:
    if arg == "quickstart":
        runs = whole_life("dense", "moe")
    elif arg == "test":
        runs = whole_life("test", "test_moe")
    else:
        name, _, size = arg.partition(",")
        runs = {run: replace(config, name=f"{name}-{run}") for run, config in STUDIES[name](pretraining(size)).items()}
    return Study(name=f"dense-vs-moe-{arg.replace(',', '-')}", experiments=runs)


def whole_life(dense: quickstart.Variant, moe: quickstart.Variant) -> dict[str, Experiment]:
    """Equal active parameters but for the router, equal tokens, the same batches, from pre-training to PPO."""
    one, other = quickstart.get_config(dense), quickstart.get_config(moe)
    return {"dense": replace(one, stages=other.stages), "moe": other}


def pretraining(size: str) -> Experiment:
    """The dense run that the others are derived from; evaluated often, since its curve against FLOPs is what counts."""
    config = whole_life("test", "test_moe")["dense"] if size else whole_life("dense", "moe")["dense"]
    config = config.with_stage("pretrain", steps=60 if size else 1400, batch_size=8, eval_every=20 if size else 100)
    return config.only("pretrain")


def sparse(dense: Experiment, num_experts: int, top_k: int, width: float = 1.0, **moe) -> Experiment:
    """Experts in place of the dense layers; the top_k of a token are together `width` times as wide as those."""
    mlp_dim = round(width * dense.model.mlp_dim) // top_k
    experts = MoEConfig(num_experts=num_experts, top_k=top_k, mlp_dim=mlp_dim, **moe)
    return replace(dense, model=replace(dense.model, moe=experts))


def matched_active(dense: Experiment) -> dict[str, Experiment]:
    """Two of eight experts are as wide as the dense layer: equal active parameters but for the router."""
    return {"dense": dense, "moe": sparse(dense, 8, 2)}


def matched_flops(dense: Experiment) -> dict[str, Experiment]:
    """As many steps of each as the dense run's FLOPs pay for: fewer for experts twice as wide, and fewer for the products of
    the router, which are the more the finer the experts are."""
    cfg = dense.stage("pretrain", Pretrain)
    budget = cfg.steps * cfg.batch_size * cfg.length * train_flops_per_token(known_vocab(dense), cfg.length)
    runs = {"moe": sparse(dense, 8, 2), "wide": sparse(dense, 8, 2, width=2.0), "fine": sparse(dense, 32, 8)}
    return {"dense": dense} | {name: paid(run, budget) for name, run in runs.items()}


def paid(run: Experiment, budget: float) -> Experiment:
    """With the number of steps whose FLOPs are nearest to `budget`."""
    cfg = run.stage("pretrain", Pretrain)
    return run.with_stage("pretrain", steps=steps_for_flops(known_vocab(run), cfg.length, cfg.batch_size, budget))


def known_vocab(run: Experiment) -> ModelConfig:
    """The model with the vocabulary that the tokenizer is going to have."""
    return replace(run.model, vocab_size=run.model.vocab_size or run.tokenizer.size)


def matched_total(dense: Experiment) -> dict[str, Experiment]:
    """The dense layer is as wide as all eight experts together: the upper bound of what they can hold."""
    wide = replace(dense, model=replace(dense.model, mlp_dim=4 * dense.model.mlp_dim))
    return {"dense": wide, "moe": sparse(dense, 8, 2)}


def granularity(dense: Experiment) -> dict[str, Experiment]:
    """The same width, active and in all, cut into finer experts (Krajewski et al. 2024, arXiv:2402.07871). Gates are not
    renormalized, which one expert a token rules out."""
    return {"dense": dense} | {f"g{g}": sparse(dense, 4 * g, g, renormalize=False) for g in (1, 2, 4, 8)}


def experts(dense: Experiment) -> dict[str, Experiment]:
    """More experts of the same width, of which a token still takes two: more parameters at equal active ones."""
    return {"dense": dense} | {f"e{e}": sparse(dense, e, 2) for e in (4, 8, 16, 32)}


STUDIES = {study.__name__: study for study in (matched_active, matched_flops, matched_total, granularity, experts)}
