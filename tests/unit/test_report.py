"""The report: a made-up workdir goes in; a self-contained, well-formed, escaped page comes out, whatever is there."""

import html.parser
import io
import json
import math
import re
import subprocess
import sys

import pytest
import rich.console

from llmjax import units
from llmjax.errors import UserError
from llmjax.report import plots, read, render, sections, tables
from llmjax.results import (
    About,
    Bars,
    Curve,
    Figure,
    HeatMap,
    Metric,
    Panel,
    Sample,
    Source,
    Start,
    Summary,
    Table,
    write_about,
    write_summary,
)

# Names and titles of stages, which the report knows from their summaries alone.
STAGES = {"pretrain": "Pre-training", "sft": "SFT", "reward": "Reward model", "polish": "Polishing"}
SCRIPT = "<script>alert('x')</script> & $a_1$ \u00e9"
VOID = {"meta", "br", "hr", "img", "link", "input"}


def records(stage, moe=False, steps=40, level=0.0):
    """Metrics shaped like a real run's."""
    for step in range(0, steps, 1):
        t = step / (steps - 1)
        base = {"stage": stage, "step": step, "kind": "train"}
        if stage == "polish":
            yield base | {
                "loss": 0.3, "reward": 2 * t + 0.2 * math.sin(step), "gold": 0.55 + 0.2 * t + level, "kl": 9 * t * t,
                "clip_fraction": 0.08 * t, "explained_variance": 0.8 * t, "tokens_per_second": 4000.0,
            }
            continue
        record = base | {
            "loss": 3.5 * math.exp(-3 * t) + 0.9 + 0.05 * math.sin(7 * step) + level, "grad_norm": 1.0, "mfu": 0.2,
            "tokens_per_second": 12000 + 300 * math.sin(step), "learning_rate": 1e-3, "peak_memory": 2.5e9,
        }
        record |= {"epoch/web": 0.01 * step, "epoch/code": 0.1 * step} if stage == "pretrain" else {"epoch": 0.05 * step}
        record |= {"accuracy": 0.5 + 0.35 * t} if stage == "reward" else {}
        if moe:
            record |= {"moe/entropy": 1.8, "moe/max_load": 1.6, "moe/dropped": 0.0}
        if moe and step % 8 == 7:
            record |= {f"moe/load/{i}/{j}": (1 + (1 - t) * math.sin(3 * j + i)) / 8 for i in range(4) for j in range(8)}
        yield record
        if step % 8 == 7:
            bits = 2.6 * math.exp(-2 * t) + 0.75 + level
            extra = {
                "pretrain": {"bits_per_byte": bits, "perplexity": math.exp(1.4 * bits)},
                "reward": {"accuracy": 0.5 + 0.33 * t},
            }
            yield base | {"kind": "eval", "loss": 1.4 * bits} | extra.get(stage, {})


def one(metric, unit, kind="train", **fields):
    """A panel of one curve."""
    return Panel(unit, (Curve(metric, kind),), **fields)


def loss(unit):
    return Figure("Loss", (Panel(unit, (Curve("loss", label="training"), Curve("loss", "eval", "held out"))),))


SPEED = Figure("Throughput", (one("tokens_per_second", "tokens/s", from_zero=True),))
EXPERTS = (
    HeatMap("Expert load", "moe/load", "train", "layer", "expert", "Share of the tokens."),
    Figure("Busiest expert", (one("moe/max_load", "multiple of uniform", from_zero=True),)),
    Figure("Choices dropped", (one("moe/dropped", "% of choices", from_zero=True),)),  # all zero: not drawn
    Figure("Routing change", (one("moe/routing_change", "% of choices", "eval"),)),  # no values: not drawn
)
FIGURES = {
    "pretrain": (
        Figure("Held-out text", (one("bits_per_byte", "bits per byte", "eval", lines=(("5-gram baseline", 1.61),)),), SCRIPT),
        loss("nats per token"), SPEED,
    ),
    "sft": (
        loss("nats per answer token"), SPEED,
        Bars("Follows instructions", "% of held-out prompts", (("before SFT", 0.07), ("after SFT", 0.93))),
    ),
    "reward": (
        Figure("Ranking accuracy", (Panel("% of pairs", (Curve("accuracy", label="training"),
               Curve("accuracy", "eval", "held out")), (("chance", 0.5), ("noise ceiling", 0.885))),)),
        loss("nats per pair"),
    ),
    "polish": (
        Figure("Reward", (one("reward", "reward"), one("gold", "Gold")), "What is watched."),
        Figure("KL from sft", (one("kl", "nats per answer"),)),
        Figure("Update", (one("clip_fraction", "% of tokens clipped"),), compare=False),
    ),
}  # fmt: skip
METRICS = {
    "pretrain": (
        Metric("bits_per_byte", 1.123, "Held-out text", "bits/byte", baseline=("5-gram baseline", 1.61), headline=True),
        Metric("loss", 1.31, "Held-out loss", "nats/token"), Metric("perplexity", 3.7),
        Metric("num_params", 1.23e6, "Parameters", "parameters"),
        Metric("num_active_params", 1.23e6, "Active per token", "parameters"),
        Metric("ngram5_bits_per_byte", 1.61, "5-gram baseline", "bits/byte"),
    ),
    "sft": (
        Metric("loss", 0.42, "Held-out loss", "nats/token"),
        Metric("followed", 0.93, "Follows instructions", "%", 0.016, ("before", 0.07), True),
    ),
    "reward": (
        Metric("accuracy", 0.841, "Held-out accuracy", "% of pairs", 0.012, ("noise ceiling", 0.885), True),
        Metric("noise_ceiling", 0.885, "Noise ceiling", "%"),
        Metric("accuracy_of_ceiling", 0.95, "Accuracy / ceiling", "%"),
        Metric("accuracy_on_new", 0.8, "Accuracy on new prompts", "% of pairs", baseline=("chance", 0.5)),
    ),
    "polish": (
        Metric("gold", 0.72, "Gold", "", 0.02, ("before", 0.55), True),
        Metric("kl", 8.7, "KL from sft", "nats per answer", headline=True),
        Metric("unsaid", 0.123456, headline=True),
    ),
}  # fmt: skip
TABLE = Table(
    "Held-out prompts", (("gold", "Gold", ""), ("correct", "Correct", "%"), ("kl", "KL from sft", "nats per answer")),
    (
        {"name": "pretrain", "gold": 0.11, "gold_stderr": 0.01, "correct": 0.04, "kl": None},
        {"name": "sft", "gold": 0.55, "gold_stderr": 0.015, "correct": 0.51, "correct_stderr": 0.03, "kl": 0.0},
        {"name": "polish", "gold": 0.72, "gold_stderr": 0.02, "correct": 0.63, "correct_stderr": 0.03, "kl": 8.7},
    ),
)  # fmt: skip


def make_workdir(folder, stages=tuple(STAGES), moe=False, level=0.0):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record) for stage in stages for record in records(stage, moe, level=level)]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    config = {"seed": 0, "model": {"num_layers": 4, "name": SCRIPT}, "stages": {name: {} for name in STAGES}}
    (folder / "config.json").write_text(json.dumps(config))
    samples = (Sample("Where does Mara live?", SCRIPT, "gold 0.9"),
               Sample("Once upon a time", "\n  there was a fox.", continues=True))  # fmt: skip
    for stage in stages:
        metrics = METRICS[stage]
        if moe and stage == "pretrain":
            metrics = tuple(Metric(m.name, 3.1e6, m.label, m.unit) if m.name == "num_params" else m for m in metrics)
        write_summary(folder / stage, Summary(
            stage, STAGES[stage], f"What {stage} is about.", 400, 71.3, 640_000, metrics,
            FIGURES[stage] + (EXPERTS if moe and stage == "pretrain" else ()), samples, (TABLE,) if stage == "polish" else (),
        ))  # fmt: skip
    return folder


class Checker(html.parser.HTMLParser):
    """Collects text, attributes and ids; complains about tags that do not close in order."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.ids, self.addresses, self.text = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self._note(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self._note(tag, attrs)

    def _note(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.addresses += [value for name, value in attrs if name in ("href", "src", "action", "data", "srcset")]

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]} at {self.getpos()}"
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


def check(path):
    page = path.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids))
    assert "script" not in checker.tags
    assert not re.search(r"https?://|@import|url\((?!#)", page)
    targets = {address[1:] for address in checker.addresses if address.startswith("#")}
    targets |= set(re.findall(r"url\(#([^)]*)\)", page))
    assert targets <= set(checker.ids)
    assert all(re.match(r"#|[\w.-]+/report\.html$", address) for address in checker.addresses)
    assert not re.search(r"#0000[0-9a-f]{2}", page)  # every stand-in colour has become a variable
    used, defined = set(re.findall(r"var\((--\w+)\)", page)), set(re.findall(r"(--\w+):", page))
    assert used <= defined
    return checker, " ".join(" ".join(checker.text).split())


@pytest.mark.parametrize("moe", [False, True])
def test_report_of_a_whole_run(tmp_path, moe):
    path = render.write_report(make_workdir(tmp_path / "run", moe=moe), "A tiny model, start to end")
    assert path == tmp_path / "run" / "report.html"
    checker, text = check(path)
    assert text.count(SCRIPT) >= 4  # shown as text, not run
    assert checker.tags.count("svg") == (13 if moe else 11) + 6  # learning rate and gradient norm, folded away, of three stages
    for shown in (
        "Pre-training: held-out text 1.12 bits/byte 5-gram baseline 1.61 bits/byte: 30 % lower",
        "SFT: follows instructions 93.0 ± 1.6 % before 7.0 %: +86 points",
        "Reward model: held-out accuracy 84.1 ± 1.2 % of pairs noise ceiling 88.5 % of pairs: -4 points",
        "Polishing: gold 0.720 ± 0.020 before 0.550: 31 % higher",
        "Time, all stages 4 min 45 s", "run · 4 min 45 s in all · 2.56 M tokens · config ",
        "What sft is about.", "Optimizer steps 400", "Throughput 12.0 k tokens/s", "Accuracy on new prompts 80.0 % of pairs",
        "chance 50.0 % of pairs", "Once upon a time there was a fox.", "gold 0.9", "What is watched.", "Resolved config",
        "sft 0.55 ± 0.01 51.0 ± 3.0 0", "llmjax-chat --workdir=", "MFU 20.0 %", "Peak memory of a device 2.50 GB",
        "Data seen 1.95 epochs", "Data seen: web 0.390 epochs Data seen: code 3.90 epochs",
        "Learning rate, Gradient norm Learning rate", "global norm, before clipping",
    ):  # fmt: skip
        assert shown in text, shown
    assert "0.123" not in text  # what has no label is kept for programs
    assert ("3.10 M parameters" in text) == ("Expert load" in text) == moe


def test_names_keep_their_capitals_on_the_cards(tmp_path):
    labels = [card.label for card in sections.cards(read.read_run(make_workdir(tmp_path)))]
    assert "Polishing: KL from sft" in labels


def test_what_is_compared_with_is_said_once_among_the_facts(tmp_path):
    for section in sections.run_sections(read.read_run(make_workdir(tmp_path))):
        labels = [label.casefold() for label, _ in section.facts]
        assert len(labels) == len(set(labels)), labels


@pytest.mark.parametrize("stages", [(), ("pretrain",), ("pretrain", "sft"), ("sft", "reward"), ("polish",)])
def test_report_after_any_subset(tmp_path, stages):
    checker, text = check(render.write_report(make_workdir(tmp_path, stages), "Part"))
    for stage, title in STAGES.items():
        assert (f"{title} ✓" if stage in stages else f"{stage}: not yet") in text
        assert (stage in checker.ids) == (stage in stages)
    assert ("llmjax-chat" in text) == bool(stages) and f"({', '.join(s for s in STAGES if s not in stages)})" in text


def test_stages_come_in_the_order_of_the_config_then_what_else_is_there(tmp_path):
    make_workdir(tmp_path, ("reward", "pretrain"))
    write_summary(tmp_path / "another", Summary("another"))
    assert read.read_run(tmp_path).stages == [*STAGES, "another"]
    (tmp_path / "config.json").unlink()
    assert read.read_run(tmp_path).stages == ["reward", "pretrain", "another"]


def test_report_of_a_stage_that_has_only_begun(tmp_path):
    rows = [{"step": 0, "kind": "train", "loss": 2.0}, {"step": 1, "kind": "train", "loss": math.nan}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"stage": "climb"} | row) + "\n" for row in rows))
    checker, text = check(render.write_report(tmp_path, "Begun"))
    assert "climb: not yet" in text and "Has begun and is not complete." in text and checker.tags.count("svg") == 1
    assert "Optimizer steps 1 " in text


def test_report_of_a_run_that_goes_on(tmp_path):
    make_workdir(tmp_path, ("pretrain",))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records("sft", steps=1235))
    _, text = check(render.write_report(tmp_path, "x", (), going=True))
    assert re.search(r" Still going on: as of [-\d]{10} \d\d:\d\d[+-]\d\d:\d\d, sft after step 1,234\. This page is", text)
    assert "sft: under way" in text and "reward: not yet" in text
    assert "How to go on" not in text and "sft Has begun and is not complete. Optimizer steps 1,234 " in text
    _, text = check(render.write_report(make_workdir(tmp_path), "x"))
    assert "Still going on" not in text


def test_what_was_drawn_before_is_not_drawn_again(tmp_path, monkeypatch):
    """A run writes its report many times."""
    make_workdir(tmp_path, ("pretrain", "sft"), moe=True)
    page = render.write_report(tmp_path, "x").read_text()
    monkeypatch.setattr(plots, "_render", lambda *args: pytest.fail("drawn again"))
    assert render.write_report(tmp_path, "x").read_text() == page


ABOUT = About(
    (
        Start("2026-11-27 10:00:00+01:00", "llmjax --config=a.py"),
        Start("2026-11-28 10:00:00+01:00", f"llmjax --config=a.py # {SCRIPT}", "0123456789ab-dirty", "8 × H100",
              {"python": "3.11.9", "jax": "0.10.1"}),
    ),
    1024,
    {
        "pretrain": (
            Source("web", "documents", 12_345, 2_000_000, 6_400_000, 600, note="12,945 documents of web.jsonl"),
            Source("code", "documents", 7, 500),
        ),
        "sft": (Source("", "dialogues", 180, 9000, truncated=12, dropped=3),),
    },
)  # fmt: skip


def test_data_commands_and_versions_are_folded_away_at_the_end(tmp_path):
    workdir = make_workdir(tmp_path / "run", ("pretrain",))
    write_about(workdir, ABOUT)
    checker, text = check(render.write_report(workdir, "x"))
    assert checker.tags.count("details") == 4  # the aside figures, data, command, config
    details = text.partition(" Details ")[2]
    for shown in (
        "Held out Text Tokens Bytes per token Cut to length Left out From",
        "Pre-training: web 12.3 k documents 600 6.40 MB 2.00 M 3.20 – – 12,945 documents of web.jsonl",
        "Pre-training: code 7 documents – – 500 – – – –", "sft 180 dialogues – – 9,000 – 12 3 –",
        "Vocabulary of the tokenizer 1,024 tokens", "Device 8 × H100 Commit of the experiment 0123456789ab-dirty",
        "python 3.11.9 jax 0.10.1 2026-11-27 10:00:00+01:00 llmjax --config=a.py 2026-11-28", SCRIPT,
    ):  # fmt: skip
        assert shown in details, shown
    few = About(data={"sft": ABOUT.data["sft"]})
    write_about(workdir, few)
    _, text = check(render.write_report(workdir, "x"))
    assert "To train on Tokens Cut to length Left out sft 180 dialogues 9,000 12 3 Resolved config" in text


def test_next_steps_may_be_given(tmp_path):
    steps = [("do this", "llmjax --config=a.py --workdir='a b'")]
    _, text = check(render.write_report(make_workdir(tmp_path, ("sft",)), "x", steps))
    assert "do this llmjax --config=a.py --workdir='a b'" in text and "llmjax-chat" not in text


def test_study_report_sets_runs_side_by_side(tmp_path):
    make_workdir(tmp_path / "dense")
    make_workdir(tmp_path / "moe", moe=True, level=-0.1)
    render.write_report(tmp_path / "dense", "Dense")
    path = render.write_study_report(tmp_path, ["dense", "moe"], "Dense beside sparse")
    checker, text = check(path)
    assert checker.addresses.count("dense/report.html") == 1 and "moe/report.html" not in checker.addresses
    for shown in ("Parameters 1.23 M 3.10 M", "Gold 0.720 ± 0.020 0.720 ± 0.020", "Held-out text (bits/byte) 1.12 1.12",
                  "Follows instructions 93.0 ± 1.6 % 93.0 ± 1.6 %", "dense: Polishing: gold 0.720 ± 0.020",
                  "Of each run: before SFT, after SFT."):  # fmt: skip
        assert shown in text, shown
    titles = {s.name: [figure.title for figure in s.figures] for s in sections.study_sections(runs_of(tmp_path))}
    curves = ["Loss: training", "Loss: held out"]
    assert titles == {  # a picture for each curve; heat maps, what is all zero and what is not to be compared are left out
        "pretrain": ["Held-out text", *curves, "Throughput", "Busiest expert"],
        "sft": [*curves, "Throughput", "Follows instructions"],
        "reward": ["Ranking accuracy: training", "Ranking accuracy: held out", *curves],
        "polish": ["Reward: reward", "Reward: Gold", "KL from sft"],
    }
    assert checker.tags.count("svg") == sum(map(len, titles.values()))


def runs_of(folder):
    return [read.read_run(folder / name, name) for name in ("dense", "moe")]


def test_study_report_of_runs_at_different_stages(tmp_path):
    make_workdir(tmp_path / "dense", ("pretrain",))
    make_workdir(tmp_path / "moe", ())
    _, text = check(render.write_study_report(tmp_path, ["dense", "moe"]))
    assert "Held-out text (bits/byte) 1.12 –" in text and "Noise ceiling" not in text
    assert "pretrain: not yet" in text  # in one of the two


def test_study_waits_for_no_stage_that_an_experiment_does_not_have(tmp_path):
    """One of the two ends with SFT."""
    make_workdir(tmp_path / "dense")
    make_workdir(tmp_path / "moe", ("pretrain", "sft"))
    write_about(tmp_path / "moe", ABOUT)
    (tmp_path / "moe" / "config.json").write_text('{"stages": {"pretrain": {}, "sft": {}}}')
    _, text = check(render.write_study_report(tmp_path, ["dense", "moe"]))
    assert "not yet" not in text and text.count("✓") == 4
    assert "Data and tokenizer: moe" in text and "Resolved config: dense" in text


def test_broken_lines_of_the_metrics_are_left_out_and_the_report_says_so(tmp_path):
    workdir = make_workdir(tmp_path / "run", ("sft",))
    whole = read.read_run(workdir)
    with open(workdir / "metrics.jsonl", "r+b") as file:
        lines = file.read().split(b"\n")
        file.seek(0)
        file.write(b"\n".join([lines[0], b"\x00\xff rubbish", b"{}", *lines[1:], b'{"stage": "sf']))
    run = read.read_run(workdir)
    assert run.metrics == whole.metrics
    said = "not a JSON object with stage, step, kind; the line is left out"
    assert run.broken == [f"{workdir / 'metrics.jsonl'}:{number}: {said}" for number in (2, 3)]
    assert "2 broken lines of metrics.jsonl left out" in check(render.write_report(workdir, "x"))[1]


def test_broken_inputs_are_one_line(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        render.write_report(tmp_path / "none", "x")
    workdir = make_workdir(tmp_path / "run", ("sft",))
    (workdir / "sft" / "result.json").write_text("{")
    with pytest.raises(UserError, match=r"result\.json:1: not JSON"):
        render.write_report(workdir, "x")
    assert not (workdir / "report.html").exists()


# ---- reading ----------------------------------------------------------------------------------------------------


def test_metrics_of_a_killed_and_resumed_run(tmp_path):
    row = '{{"stage": "sft", "step": {}, "kind": "train", "loss": {}}}\n'
    (tmp_path / "metrics.jsonl").write_text(
        row.format(0, 3.0) + row.format(1, 9.0) + row.format(1, 2.0) + row.format(2, 1.0) + '{"stage": "sf'
    )
    assert read.read_run(tmp_path).curve("sft", "train", "loss") == ([0.0, 1.0, 2.0], [3.0, 2.0, 1.0])


def test_expert_loads_are_multiples_of_uniform_in_numeric_order(tmp_path, monkeypatch):
    """And the mean of the last tenth of the rows that have them: 2 of 20 here, among others without."""
    rows = []
    for step in range(40):
        loads = {f"moe/load/0/{j}": (0.5 if j == 10 else 0.0) / 16 for j in range(16)}
        loads["moe/load/0/10"] = {37: 1.0, 39: 3.0}.get(step, 9.0) / 16
        rows.append({"stage": "sft", "step": step, "kind": "train"} | (loads if step % 2 else {}))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_summary(tmp_path / "sft", Summary("sft", figures=EXPERTS[:1]))
    drawn = []
    monkeypatch.setattr(sections, "heat_map", lambda name, values, *labels: drawn.append((values, *labels)) or "<svg></svg>")
    (section,) = sections.run_sections(read.read_run(tmp_path))
    assert [figure.title for figure in section.figures] == ["Expert load"]
    ((values, row_label, column_label, strongest),) = drawn
    assert values == (pytest.approx([2.0 if j == 10 else 0.0 for j in range(16)]),)
    assert (row_label, column_label, strongest) == ("layer", "expert", 2.0)


def test_the_final_value_is_that_of_the_summary_else_of_the_last_evaluation(tmp_path):
    run = read.read_run(make_workdir(tmp_path))
    assert run.final("pretrain", "bits_per_byte") == 1.123
    assert run.final("pretrain", "nothing") is None
    (tmp_path / "pretrain" / "result.json").unlink()
    run = read.read_run(tmp_path)
    assert run.final("pretrain", "bits_per_byte") == run.curve("pretrain", "eval", "bits_per_byte")[1][-1] != 1.123
    assert run.throughput("polish") == 4000.0


# ---- tables and units -------------------------------------------------------------------------------------------


def as_text(table):
    console = rich.console.Console(file=io.StringIO(), width=160)
    console.print(table)
    return console.file.getvalue()


def test_the_table_of_a_stage_for_the_terminal():
    text = as_text(tables.to_rich(tables.table_grid(TABLE)))
    assert re.search(r" Gold +Correct \(%\) +KL from sft \(nats per answer\)", text)
    assert re.search(r"polish +0\.72±0\.02 +63\.0±3\.0 +8\.70\n", text)
    assert re.search(r"pretrain +0\.11±0\.01 +4\.0 +–\n", text)


def test_study_table_for_the_terminal(tmp_path):
    make_workdir(tmp_path / "dense")
    text = as_text(tables.study_table([read.read_run(tmp_path / "dense", "[dense]")]))
    assert "[dense]" in text and re.search(r"Accuracy / ceiling +95\.0 %\n", text)


@pytest.mark.parametrize(("value", "unit", "error", "expected"), [
    (0.918, "%", None, "91.8 %"), (0.918, "%", 0.0113, "91.8 ± 1.1 %"), (0.5, "% of pairs", None, "50.0 % of pairs"),
    (0.5, "% of pairs", 0.02, "50.0 ± 2.0 % of pairs"), (1.23e6, "parameters", None, "1.23 M parameters"),
    (8192, "tokens", None, "8,192 tokens"), (290, "s", None, "4 min 50 s"), (0.72, "", 0.02, "0.720 ± 0.020"),
    (1.5, "nats per answer", 0.25, "1.50 ± 0.25 nats per answer"), (None, "tokens", None, "–"),
    (float("nan"), "%", 0.1, "–"), (2.5e9, "B", None, "2.50 GB"), (180, "dialogues", None, "180 dialogues"),
])  # fmt: skip
def test_numbers_with_their_units(value, unit, error, expected):
    assert units.text(value, unit, error) == expected


@pytest.mark.parametrize(("text", "expected"), [
    (units.number(1.8749), "1.87"), (units.number(0.012345), "0.0123"), (units.number(12345), "12,300"),
    (units.number(0.9999), "1.00"), (units.number(0.0), "0"), (units.number(None), "–"),
    (units.number(1.2e-9), "1.20e-09"),
    (units.number(float("nan")), "–"), (units.number(-8.7), "-8.70"), (units.number(9.996), "10.0"),
    (units.count(950), "950"), (units.count(12345), "12.3 k"), (units.count(6.1e6), "6.10 M"),
    (units.count(1.7e9), "1.70 G"), (units.count(2.01e12), "2.01 T"), (units.count(3.8e22), "38.0 Z"),
    (units.percent(0.918), "91.8 %"), (units.seconds(8.2), "8.2 s"), (units.size(950), "950 B"), (units.size(12345), "12.3 kB"),
    (units.size(1.7e9), "1.70 GB"), (units.size(None), "–"),
    (units.seconds(290), "4 min 50 s"), (units.seconds(7500), "2 h 05 min"), (units.seconds(3599.7), "1 h 00 min"),
    (units.with_error(0.8123, 0.011), "0.812 ± 0.011"), (units.with_error(12.3, 1.5), "12.3 ± 1.5"),
    (units.with_error(1.0, None), "1.00"), (units.with_unit("–", "s"), "–"),
])
def test_numbers_as_people_read_them(text, expected):
    assert text == expected


# ---- plots ------------------------------------------------------------------------------------------------------


def test_thin_keeps_the_mean_and_drops_what_is_not_finite():
    x, y = plots.thin(range(1000), [float(i) for i in range(999)] + [math.nan], limit=100)
    assert len(x) <= 100
    assert y[0] == sum(range(10)) / 10
    assert all(map(math.isfinite, y))


def test_running_mean_is_centred():
    assert plots.running_mean([0.0, 3.0, 6.0, 9.0], 3) == [1.5, 3.0, 6.0, 7.5]


def test_plots_are_reproducible_and_escape_labels():
    def draw():
        series = (plots.Series(SCRIPT, (0, 1), (1.0, 2.0)), plots.Series("b", (0, 1), (2.0, 1.0), 1))
        plots.line_plot.cache_clear()
        return plots.line_plot("same", (plots.Panel("nats", series),))

    assert draw() == draw()
    assert "<script>" not in draw() and "$a_1$" in draw()


def test_importing_the_report_imports_neither_matplotlib_nor_jax():
    code = "import sys, llmjax.report.render; assert not {'jax', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
