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

from llmjax.analysis import plots, report, runs, tables, units
from llmjax.errors import UserError

STAGES = ("pretrain", "sft", "reward", "ppo")
SCRIPT = "<script>alert('x')</script> & $a_1$ \u00e9"
VOID = {"meta", "br", "hr", "img", "link", "input"}


def records(stage, moe=False, steps=40, level=0.0):
    """Metrics shaped like a real run's."""
    for step in range(0, steps, 1):
        t = step / (steps - 1)
        base = {"stage": stage, "step": step, "kind": "train"}
        if stage == "ppo":
            yield base | {
                "reward": 2 * t + 0.2 * math.sin(step), "gold": 0.55 + 0.2 * t + level, "kl": 9 * t * t,
                "ratio_max": 1.2, "clip_fraction": 0.08 * t, "entropy": 1.1, "value_loss": 0.2,
                "explained_variance": 0.8 * t, "response_length": 21.0, "tokens_per_second": 4000.0,
            }
            continue
        record = base | {
            "loss": 3.5 * math.exp(-3 * t) + 0.9 + 0.05 * math.sin(7 * step) + level, "grad_norm": 1.0, "mfu": 0.2,
            "tokens_per_second": 12000 + 300 * math.sin(step), "learning_rate": 1e-3,
        }
        record |= {"accuracy": 0.5 + 0.35 * t} if stage == "reward" else {}
        if moe:
            record |= {"moe/load_balance": 1.02, "moe/z_loss": 0.1, "moe/entropy": 1.8, "moe/max_load": 0.2}
            record |= {f"moe/load/{i}/{j}": (1 + (1 - t) * math.sin(3 * j + i)) / 8 for i in range(4) for j in range(8)}
        yield record
        if step % 8 == 7:
            bits = 2.6 * math.exp(-2 * t) + 0.75 + level
            extra = {
                "pretrain": {"bits_per_byte": bits, "perplexity": math.exp(1.4 * bits)},
                "reward": {"accuracy": 0.5 + 0.33 * t},
            }
            yield base | {"kind": "eval", "loss": 1.4 * bits} | extra.get(stage, {})


FINAL = {
    "pretrain": {"loss": 1.31, "perplexity": 3.7, "bits_per_byte": 1.123, "ngram5_bits_per_byte": 1.61,
                 "num_params": 1_230_000, "num_active_params": 1_230_000},
    "sft": {"loss": 0.42, "instruction_following_before": 0.07, "instruction_following_after": 0.93},
    "reward": {"loss": 0.3, "accuracy": 0.841, "noise_ceiling": 0.885},
    "ppo": {},
}
TABLE = [
    {"model": "base", "gold": 0.11, "gold_stderr": 0.01, "correct": 0.04, "instruction_following": 0.07, "kl": None},
    {"model": "sft", "gold": 0.55, "gold_stderr": 0.015, "correct": 0.51, "instruction_following": 0.93, "kl": 0.0},
    {"model": "ppo", "gold": 0.72, "gold_stderr": 0.02, "correct": 0.63, "instruction_following": 0.98, "kl": 8.7},
]


def make_workdir(folder, stages=STAGES, moe=False, level=0.0):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record) for stage in stages for record in records(stage, moe, level=level)]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    (folder / "config.json").write_text(json.dumps({"seed": 0, "model": {"num_layers": 4, "name": SCRIPT}}))
    for stage in stages:
        (folder / stage).mkdir(exist_ok=True)
        metrics = FINAL[stage] | ({"num_params": 3_100_000} if moe and stage == "pretrain" else {})
        result = {
            "stage": stage, "steps": 400, "seconds": 71.3, "tokens": 640_000, "metrics": metrics,
            "samples": [{"prompt": "Where does Mara live?", "answer": SCRIPT, "note": "gold 0.9"},
                        {"prompt": "", "answer": "Once upon a time\n  there was a fox.", "note": ""}],
            "config": {},
        } | ({"table": TABLE} if stage == "ppo" else {})
        (folder / stage / "result.json").write_text(json.dumps(result))
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
    path = report.write_report(make_workdir(tmp_path / "run", moe=moe), "A tiny model, start to end")
    assert path == tmp_path / "run" / "report.html"
    checker, text = check(path)
    assert SCRIPT in text  # shown as text, not run
    assert checker.tags.count("svg") == (13 if moe else 10)
    for shown in ("1.12 bits per byte", "5-gram baseline 1.61: 30 % lower", "93.0 % of held-out prompts", "+86 points",
                  "95.0 % of the noise ceiling (88.5 %)", "0.720 ± 0.020 points", "SFT 0.550 ± 0.015: +0.17 points",
                  "6.8 standard errors", "8.70 nats per sequence", "4 min 45 s", "llmjax-chat --workdir=",
                  "Resolved config"):
        assert shown in text, shown
    assert ("1.23 M active per token" in text) == moe
    assert ("Expert load" in text) == moe


@pytest.mark.parametrize("stages", [(), ("pretrain",), ("pretrain", "sft"), ("sft", "reward"), ("ppo",)])
def test_report_after_any_subset(tmp_path, stages):
    checker, text = check(report.write_report(make_workdir(tmp_path, stages), "Part"))
    for stage, label in runs.STAGES.items():
        assert (f"{label} ✓" if stage in stages else f"{label}: not yet") in text
        assert (stage in checker.ids) == (stage in stages)


def test_report_of_a_stage_that_has_only_begun(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"stage": "ppo", "step": 0, "kind": "train", "reward": NaN, "kl": 0.0}\n')
    checker, text = check(report.write_report(tmp_path, "Begun"))
    assert "KL from the SFT model" in text and "PPO: not yet" in text


def test_study_report_sets_runs_side_by_side(tmp_path):
    make_workdir(tmp_path / "dense")
    make_workdir(tmp_path / "moe", moe=True, level=-0.1)
    report.write_report(tmp_path / "dense", "Dense")
    path = report.write_study_report(tmp_path, ["dense", "moe"], "Dense beside sparse")
    checker, text = check(path)
    assert checker.addresses.count("dense/report.html") == 1 and "moe/report.html" not in checker.addresses
    assert "Parameters, all 1.23 M 3.10 M" in text
    assert "Gold score, PPO (points, ± SE) 0.720 ± 0.020 0.720 ± 0.020" in text
    assert checker.tags.count("svg") == 10


def test_study_report_of_runs_at_different_stages(tmp_path):
    make_workdir(tmp_path / "dense", ("pretrain",))
    make_workdir(tmp_path / "moe", ())
    _, text = check(report.write_study_report(tmp_path, ["dense", "moe"]))
    assert "Held-out bits per byte 1.12 –" in text and "Noise ceiling" not in text


def test_broken_inputs_are_one_line(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        report.write_report(tmp_path / "none", "x")
    workdir = make_workdir(tmp_path / "run", ("sft",))
    (workdir / "metrics.jsonl").write_text('{"stage": "sft", "step": 0, "kind": "train"}\n{"oops\n{}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: not a JSON object"):
        report.write_report(workdir, "x")
    (workdir / "metrics.jsonl").unlink()
    (workdir / "sft" / "result.json").write_text("{")
    with pytest.raises(UserError, match=r"result\.json:1: not JSON"):
        report.write_report(workdir, "x")
    assert not (workdir / "report.html").exists()


# ---- reading ----------------------------------------------------------------------------------------------------


def test_metrics_of_a_killed_and_resumed_run(tmp_path):
    row = '{{"stage": "sft", "step": {}, "kind": "train", "loss": {}}}\n'
    (tmp_path / "metrics.jsonl").write_text(
        row.format(0, 3.0) + row.format(1, 9.0) + row.format(1, 2.0) + row.format(2, 1.0) + '{"stage": "sf'
    )
    assert runs.read_run(tmp_path).curve("sft", "train", "loss") == ([0.0, 1.0, 2.0], [3.0, 2.0, 1.0])


def test_expert_loads_are_multiples_of_uniform_in_numeric_order(tmp_path):
    loads = {f"moe/load/0/{j}": (2.0 if j == 10 else 0.0) / 16 for j in range(16)}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"stage": "sft", "step": 3, "kind": "train"} | loads) + "\n")
    steps, values = runs.read_run(tmp_path).expert_loads()
    assert steps == [3.0]
    assert values == [[[2.0 if j == 10 else 0.0 for j in range(16)]]]


# ---- tables and units -------------------------------------------------------------------------------------------


def as_text(table):
    console = rich.console.Console(file=io.StringIO(), width=160)
    console.print(table)
    return console.file.getvalue()


def test_final_table_for_the_terminal():
    text = as_text(tables.final_table(TABLE))
    assert re.search(r"PPO\s*│\s*0\.720 ± 0\.020\s*│\s*63\.0 %\s*│\s*98\.0 %\s*│\s*8\.70", text)
    assert re.search(r"Base.*–", text)


def test_study_table_for_the_terminal(tmp_path):
    make_workdir(tmp_path / "dense")
    text = as_text(tables.study_table([runs.read_run(tmp_path / "dense", "[dense]")]))
    assert "[dense]" in text and re.search(r"Accuracy / ceiling\s*│\s*95\.0 %", text)


def test_gain_is_in_standard_errors_of_the_difference(tmp_path):
    run = runs.read_run(make_workdir(tmp_path))
    assert tables.gain_in_errors(run) == pytest.approx((0.72 - 0.55) / math.hypot(0.015, 0.02))
    assert tables.ceiling_share(run) == pytest.approx(0.841 / 0.885)


@pytest.mark.parametrize(("text", "expected"), [
    (units.number(1.8749), "1.87"), (units.number(0.012345), "0.0123"), (units.number(12345), "12,300"),
    (units.number(0.9999), "1.00"), (units.number(0.0), "0"), (units.number(None), "–"),
    (units.number(1.2e-9), "1.20e-09"),
    (units.number(float("nan")), "–"), (units.number(-8.7), "-8.70"), (units.number(9.996), "10.0"),
    (units.count(950), "950"), (units.count(12345), "12.3 k"), (units.count(6.1e6), "6.10 M"),
    (units.count(1.7e9), "1.70 G"), (units.count(2.01e12), "2.01 T"), (units.count(3.8e22), "38.0 Z"),
    (units.percent(0.918), "91.8 %"), (units.seconds(8.2), "8.2 s"),
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
        series = (plots.Series(SCRIPT, [0, 1], [1.0, 2.0]), plots.Series("b", [0, 1], [2.0, 1.0], 1))
        return plots.line_plot("same", [plots.Panel("nats", series)])

    assert draw() == draw()
    assert "<script>" not in draw() and "$a_1$" in draw()


def test_importing_the_report_imports_neither_matplotlib_nor_jax():
    code = "import sys, llmjax.analysis.report; assert not {'jax', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
