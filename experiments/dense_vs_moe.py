"""Dense against sparse, from pre-training to PPO: equal active parameters, equal tokens, the same batches.

    llmjax --config=experiments/dense_vs_moe.py --workdir=runs/dense_vs_moe
    llmjax --config=experiments/dense_vs_moe.py:test --workdir=runs/test   (seconds for each; what the tests run)

An override changes both, or the one that it names:

    --config.ppo.kl_coef=0.1        in both
    --config.moe.ppo.kl_coef=0.1    in the sparse one only; --config.dense.ppo.kl_coef=0.1 in the dense one
    --config.model.moe.top_k=4      where there are experts

Expected: a table of both, stage by stage, on the terminal and in report.html; each run's own report is in its folder,
runs/dense_vs_moe/dense and runs/dense_vs_moe/moe. With --config.seed=2, dense / sparse: held-out bits per byte 0.191 / 0.182;
instruction following 85 / 90 %; reward model at 0.905 / 0.925 of its ceiling; gold score 0.562 to 0.751 / 0.598 to 0.769
(standard error 0.016). Hardware: 2 CPU cores, about the time of two quickstarts.
"""

from dataclasses import replace

from experiments import quickstart
from llmjax.stages.config import Study


def get_config(arg: str = "quickstart") -> Study:
    pairs = {"quickstart": ("dense", "moe"), "test": ("test", "test_moe")}
    if arg not in pairs:
        raise ValueError(f"unknown argument {arg!r}; there is {' and '.join(pairs)}")
    dense, moe = map(quickstart.get_config, pairs[arg])
    dense = replace(dense, pretrain=moe.pretrain)
    return Study(name=f"dense-vs-moe-{arg}", experiments={"dense": dense, "moe": moe})
