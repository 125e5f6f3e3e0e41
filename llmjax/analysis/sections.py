"""The contents of a report, stage by stage: numbers with units, figures, samples. Pure functions of what a run left."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

from llmjax import config as config_lib
from llmjax.analysis import efficiency, tables, units
from llmjax.analysis.plots import Bar, Panel, Reference, Series, bar_plot, heat_map, line_plot
from llmjax.analysis.runs import STAGES, Run


@dataclasses.dataclass(frozen=True)
class Card:
    """A headline number: `label`, the `value` with its `unit`, and what to compare it with."""

    label: str
    value: str
    unit: str
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Figure:
    """A picture: `svg` is trusted markup from `plots`; the rest is text."""

    title: str
    svg: str
    caption: str = ""


@dataclasses.dataclass(frozen=True)
class Section:
    """One stage: a sentence, facts (label, value with unit), figures, and samples {"prompt", "answer", "note"}."""

    name: str
    title: str
    lead: str
    facts: tuple[tuple[str, str], ...] = ()
    figures: tuple[Figure, ...] = ()
    samples: tuple[dict[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class Page:
    """A whole report. `stages` are (label, complete), `configs` (name, text), `links` (text, relative address)."""

    title: str
    subtitle: str
    stages: tuple[tuple[str, bool], ...]
    cards: tuple[Card, ...]
    grids: tuple[tables.Grid, ...]
    sections: tuple[Section, ...]
    configs: tuple[tuple[str, str], ...]
    next_steps: tuple[tuple[str, str], ...]
    links: tuple[tuple[str, str], ...] = ()


_LEADS = {
    "pretrain": "Next-token prediction on text, measured on text that was held out.",
    "sft": "Supervised fine-tuning on dialogues; only the assistant's words and its end of turn carry loss.",
    "reward": "A reward model learns from ranked answers which of two a judge prefers.",
    "ppo": "The policy is improved against the reward model, with a KL penalty that keeps it near the SFT model; "
           "the gold score, which the reward model stands in for, is measured beside it and never trained on.",
}



def _in(unit: str) -> Callable[[float | None], str]:
    return lambda value: units.with_unit(units.number(value), unit)


# stage -> (label, name among the stage's final metrics, text with unit)
_FACTS = {
    "pretrain": (
        ("Parameters", "num_params", units.count),
        ("Active per token", "num_active_params", units.count),
        ("Held-out text", "bits_per_byte", _in("bits/byte")),
        ("5-gram baseline", "ngram5_bits_per_byte", _in("bits/byte")),
        ("Held-out loss", "loss", _in("nats/token")),
        ("Perplexity", "perplexity", _in("per token")),
    ),
    "sft": (
        ("Held-out loss", "loss", _in("nats/token")),
        ("Follows instructions, before", "instruction_following_before", units.percent),
        ("Follows instructions, after", "instruction_following_after", units.percent),
    ),
    "reward": (
        ("Held-out accuracy", "accuracy", units.percent),
        ("Noise ceiling", "noise_ceiling", units.percent),
    ),
    "ppo": (),
}


def subtitle(run: Run) -> str:
    """Name, totals and fingerprint of a run in one line."""
    parts = [
        run.name,
        units.with_unit(units.seconds(run.total("seconds")), "in all"),
        units.with_unit(units.count(run.total("tokens")), "tokens"),
        f"config {config_lib.fingerprint(run.config)}" if run.config is not None else units.MISSING,
    ]
    return " · ".join(part for part in parts if part != units.MISSING)


# ---- headline ---------------------------------------------------------------------------------------------------


def cards(run: Run) -> tuple[Card, ...]:
    """The headline numbers of the stages that are there."""
    found = (_text_card(run), _sft_card(run), _reward_card(run), _gold_card(run), _kl_card(run), _size_card(run),
             _time_card(run))
    return tuple(card for card in found if card is not None)


def _text_card(run: Run) -> Card | None:
    value, baseline = run.final("pretrain", "bits_per_byte"), run.final("pretrain", "ngram5_bits_per_byte")
    if value is None:
        return None
    note = f"5-gram baseline {units.number(baseline)}: {_change(value / baseline - 1)}" if baseline else "held out"
    return Card("Held-out text", units.number(value), "bits per byte", note)


def _change(fraction: float) -> str:
    return f"{abs(100 * fraction):.0f} % {'lower' if fraction < 0 else 'higher'}"


def _sft_card(run: Run) -> Card | None:
    before = run.final("sft", "instruction_following_before")
    after = run.final("sft", "instruction_following_after")
    if after is None:
        return None
    note = "" if before is None else f"{units.percent(before)} before SFT: {100 * (after - before):+.0f} points"
    return Card("Follows instructions", f"{100 * after:.1f}", "% of held-out prompts", note)


def _reward_card(run: Run) -> Card | None:
    accuracy, ceiling = run.final("reward", "accuracy"), run.final("reward", "noise_ceiling")
    if accuracy is None:
        return None
    share = units.percent(tables.ceiling_share(run))
    note = f"{share} of the noise ceiling ({units.percent(ceiling)})" if ceiling else ""
    return Card("Reward model", f"{100 * accuracy:.1f}", "% of held-out pairs", note)


def _gold_card(run: Run) -> Card | None:
    rows = run.final_rows()
    if "ppo" not in rows:
        return None
    sft, ppo, gain = rows.get("sft", {}), rows["ppo"], tables.gain_in_errors(run)
    note = "" if gain is None else (
        f"SFT {units.with_error(sft['gold'], sft['gold_stderr'])}: {ppo['gold'] - sft['gold']:+.3g} points, "
        f"{units.number(gain, 2)} standard errors"
    )
    value, _, error = units.with_error(ppo.get("gold"), ppo.get("gold_stderr")).partition(" ± ")
    return Card("Gold score after PPO", value, f"± {error} points" if error else "points", note)


def _kl_card(run: Run) -> Card | None:
    kl = run.final_rows().get("ppo", {}).get("kl")
    return None if kl is None else Card("Distance from SFT", units.number(kl), "nats per sequence", "KL(PPO || SFT)")


def _size_card(run: Run) -> Card | None:
    size, active = run.final("pretrain", "num_params"), run.final("pretrain", "num_active_params")
    if size is None:
        return None
    sparse = active is not None and active != size
    note = f"{units.count(active)} active per token" if sparse else "dense"
    return Card("Model", units.count(size), "parameters", note)


def _time_card(run: Run) -> Card | None:
    seconds, speed = run.total("seconds"), run.throughput("pretrain")
    if seconds is None:
        return None
    note = "" if speed is None else f"{units.count(speed)} tokens/s in pre-training"
    return Card("Time, all stages", units.seconds(seconds), "", note)


def study_cards(runs: Sequence[Run]) -> tuple[Card, ...]:
    """For each run its gold score if PPO is there, else its held-out bits per byte."""
    found = ((run, _gold_card(run) or _text_card(run)) for run in runs)
    return tuple(dataclasses.replace(card, label=f"{run.name}: {card.label}") for run, card in found if card)


# ---- stages of one run ------------------------------------------------------------------------------------------


def run_sections(run: Run) -> tuple[Section, ...]:
    """One section for each stage that has a result or any metric."""
    figures = {"pretrain": _pretrain_figures, "sft": _sft_figures, "reward": _reward_figures, "ppo": _ppo_figures}
    return tuple(
        Section(
            stage, label, _LEADS[stage], _facts(run, stage), tuple(figures[stage](run)),
            tuple(run.results.get(stage, {}).get("samples", [])),
        )
        for stage, label in STAGES.items()
        if stage in run.results or any(key[0] == stage for key in run.metrics)
    )


def _facts(run: Run, stage: str) -> tuple[tuple[str, str], ...]:
    final = [(label, text(run.final(stage, name))) for label, name, text in _FACTS[stage]]
    cost = [
        ("Optimizer steps", units.count(run.total("steps", stage))),
        ("Tokens", units.count(run.total("tokens", stage))),
        ("Throughput", units.with_unit(units.count(run.throughput(stage)), "tokens/s")),
        ("Time", units.seconds(run.total("seconds", stage))),
    ]
    return tuple(fact for fact in final + cost if fact[1] != units.MISSING)


def _series(run: Run, stage: str, specs: Sequence[tuple[str, str, str, str]], scale: float = 1.0) -> tuple[Series, ...]:
    """Curves that exist among (label, kind, metric, style), coloured in the order given."""
    made = []
    for color, (label, kind, name, style) in enumerate(specs):
        steps, values = run.curve(stage, kind, name)
        if steps:
            made.append(Series(label, steps, [scale * value for value in values], color, style))
    return tuple(made)


def _figure(name: str, title: str, panels: Sequence[Panel], caption: str = "") -> list[Figure]:
    panels = [panel for panel in panels if panel.series]
    return [Figure(title, line_plot(name, panels), caption)] if panels else []


def _references(*pairs: tuple[str, float | None]) -> tuple[Reference, ...]:
    return tuple(Reference(label, value) for label, value in pairs if value is not None)


def _loss_figure(run: Run, stage: str, unit: str) -> list[Figure]:
    specs = [("training", "train", "loss", "raw"), ("held out", "eval", "loss", "dots")]
    return _figure(f"{stage}-loss", "Loss", [Panel(unit, _series(run, stage, specs))])


def _pretrain_figures(run: Run) -> list[Figure]:
    baseline = run.final("pretrain", "ngram5_bits_per_byte")
    held_out = _series(run, "pretrain", [("held out", "eval", "bits_per_byte", "dots")])
    speed = _series(run, "pretrain", [("", "train", "tokens_per_second", "raw")])
    return [
        *_figure("pretrain-bpb", "Held-out text", [
            Panel("bits per byte", held_out, _references(("5-gram baseline", baseline)))
        ], "Lower is better; dashed: a 5-gram model fitted to the same training text."),
        *_loss_figure(run, "pretrain", "nats per token"),
        *_figure("pretrain-speed", "Throughput", [Panel("tokens/s", speed, from_zero=True)]),
        *_expert_figures(run),
    ]


def _expert_figures(run: Run) -> list[Figure]:
    steps, loads = run.expert_loads()
    if not loads:
        return []
    mean = run.mean_loads()
    strongest = max(2.0, max(max(row) for row in mean))
    extremes = (
        Series("busiest", steps, [max(max(row) for row in load) for load in loads], 0),
        Series("idlest", steps, [min(min(row) for row in load) for load in loads], 1),
    )
    router = _series(run, "pretrain", [("", "train", "moe/entropy", "raw")])
    dropped = _series(run, "pretrain", [("", "train", "moe/dropped", "raw")], 100.0)
    dropped = dropped if any(max(series.y) > 0 for series in dropped) else ()
    change = _series(run, "pretrain", [("", "eval", "moe/routing_change", "dots")], 100.0)
    return [
        Figure("Expert load", heat_map("experts", mean, "layer", "expert", strongest),
               "Share of the tokens that an expert gets, as a multiple of the uniform share (1.00), "
               "mean of the last tenth of the steps."),
        *_figure("experts-time", "Busiest and idlest expert", [
            Panel("load (multiple of uniform)", extremes, _references(("uniform", 1.0)))
        ]),
        *_figure("router-entropy", "Router entropy", [Panel("nats per token", router)]),
        *_figure("choices-dropped", "Choices dropped", [Panel("% of choices", dropped, from_zero=True)]),
        *_figure("routing-change", "Routing change", [Panel("% of choices", change, from_zero=True)],
                 "Share of the router's choices on held-out text that the same token did not make one evaluation earlier."),
    ]


def _sft_figures(run: Run) -> list[Figure]:
    before = run.final("sft", "instruction_following_before")
    after = run.final("sft", "instruction_following_after")
    figures = _loss_figure(run, "sft", "nats per answer token")
    if before is not None and after is not None:
        bars = [Bar("before SFT", 100 * before, faint=True), Bar("after SFT", 100 * after)]
        figures.append(Figure("Follows instructions", bar_plot("sft-bars", bars, "% of held-out prompts")))
    return figures


def _reward_figures(run: Run) -> list[Figure]:
    ceiling = run.final("reward", "noise_ceiling")
    specs = [("training", "train", "accuracy", "raw"), ("held out", "eval", "accuracy", "dots")]
    lines = _references(("noise ceiling", None if ceiling is None else 100 * ceiling), ("chance", 50.0))
    return [
        *_figure("reward-accuracy", "Ranking accuracy", [
            Panel("% of pairs", _series(run, "reward", specs, 100.0), lines)
        ], "Ties count half. Judges are noisy: no model can agree with them more often than the ceiling."),
        *_loss_figure(run, "reward", "nats per pair"),
    ]


def _ppo_figures(run: Run) -> list[Figure]:
    def one(name: str, color: int = 0, scale: float = 1.0, label: str = "") -> tuple[Series, ...]:
        made = _series(run, "ppo", [(label, "train", name, "raw")], scale)
        return tuple(dataclasses.replace(series, color=color) for series in made)

    sft = run.final_rows().get("sft", {}).get("gold")
    return [
        *_figure("ppo-reward", "Reward", [
            Panel("proxy (log-odds)", one("reward")),
            Panel("gold (points)", one("gold", 1), _references(("SFT, held out", sft))),
        ], "The proxy is what PPO maximises; gold is what it is for. Proxy up and gold down is over-optimisation."),
        *_figure("ppo-kl", "KL from the SFT model", [Panel("nats per sequence", one("kl", 2))]),
        *_figure("ppo-update", "Update", [
            Panel("% of tokens clipped", one("clip_fraction", 3, 100.0)),
            Panel("critic: % explained", one("explained_variance", 0, 100.0)),
        ], "Share of tokens whose ratio PPO clips, and share of the returns' variance that the critic explains."),
    ]


# ---- several runs -----------------------------------------------------------------------------------------------

# stage -> (title, y label, kind, metric, style, scale)
_OVERLAYS = {
    "pretrain": (
        ("Held-out text", "bits per byte", "eval", "bits_per_byte", "dots", 1.0),
        ("Training loss", "nats per token", "train", "loss", "raw", 1.0),
        ("Throughput", "tokens/s", "train", "tokens_per_second", "raw", 1.0),
    ),
    "sft": (
        ("Held-out loss", "nats per answer token", "eval", "loss", "dots", 1.0),
        ("Training loss", "nats per answer token", "train", "loss", "raw", 1.0),
    ),
    "reward": (("Held-out accuracy", "% of pairs", "eval", "accuracy", "dots", 100.0),),
    "ppo": (
        ("Proxy reward", "log-odds", "train", "reward", "raw", 1.0),
        ("Gold score", "points", "train", "gold", "raw", 1.0),
        ("KL from the SFT model", "nats per sequence", "train", "kl", "raw", 1.0),
    ),
}


def study_sections(runs: Sequence[Run]) -> tuple[Section, ...]:
    """One section for each stage that any run has, with the runs' curves over one another."""
    made = []
    for stage, label in STAGES.items():
        figures = [
            figure
            for index, (title, unit, kind, metric, style, scale) in enumerate(_OVERLAYS[stage])
            for figure in _figure(f"{stage}-{index}", title, [
                Panel(
                    unit, _overlay(runs, stage, kind, metric, style, scale), _stage_lines(runs, stage, metric),
                    from_zero=metric == "tokens_per_second",
                )
            ])
        ]
        figures += _flops_figure(runs) if stage == "pretrain" else []
        figures += _study_bars(runs) if stage == "sft" else []
        if figures or any(stage in run.results for run in runs):
            made.append(Section(stage, label, _LEADS[stage], figures=tuple(figures)))
    return tuple(made)


def _overlay(runs: Sequence[Run], stage: str, kind: str, metric: str, style: str, scale: float) -> tuple[Series, ...]:
    curves = [(run, *run.curve(stage, kind, metric)) for run in runs]
    return tuple(
        Series(run.name, steps, [scale * value for value in values], color, style)
        for color, (run, steps, values) in enumerate(curves) if steps
    )


def _flops_figure(runs: Sequence[Run]) -> list[Figure]:
    curves = [(run, *efficiency.flops_curve(run)) for run in runs]
    series = tuple(Series(run.name, x, y, color, "dots") for color, (run, x, y) in enumerate(curves) if x)
    if not series:
        return []
    svg = line_plot("pretrain-flops", [Panel("nats per token", series)], "training FLOPs (log scale)", log_x=True)
    return [Figure("Held-out loss by training FLOPs", svg,
                   "Where two curves are at one height, the left one is cheaper by the factor between them.")]


def _stage_lines(runs: Sequence[Run], stage: str, metric: str) -> tuple[Reference, ...]:
    if (stage, metric) == ("pretrain", "bits_per_byte"):
        baselines = {run.final(stage, "ngram5_bits_per_byte") for run in runs}
        return _references(*(("5-gram baseline", value) for value in baselines))
    return _references(("chance", 50.0)) if stage == "reward" else ()


def _study_bars(runs: Sequence[Run]) -> list[Figure]:
    names = ("instruction_following_before", "instruction_following_after")
    bars = []
    for color, run in enumerate(runs):
        before, after = (run.final("sft", name) for name in names)
        if before is not None and after is not None:
            bars += [Bar("", 100 * before, color, faint=True), Bar(run.name, 100 * after, color)]
    if not bars:
        return []
    return [Figure("Follows instructions", bar_plot("sft-bars", bars, "% of held-out prompts"),
                   "Pale: before SFT; full: after.")]


def config_texts(runs: Sequence[Run]) -> tuple[tuple[str, str], ...]:
    """(name, the resolved config as indented JSON) of each run that saved one."""
    return tuple(
        (run.name, json.dumps(run.config, indent=2, ensure_ascii=False)) for run in runs if run.config is not None
    )
