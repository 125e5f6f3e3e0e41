"""Small figures as SVG that takes colours and font from the page around it: one figure serves light and dark.

matplotlib draws with stand-in colours, which are then replaced by CSS variables: --ink, --muted, --grid, --s1 ... --s4.
It is imported inside the functions only: nothing else of llmjax needs it. A figure that was drawn before is not drawn again:
drawing is what a report takes its time for, and of a run that goes on many are written.
"""

import dataclasses
import functools
import io
import math
import re
from collections.abc import Sequence

_INK, _MUTED, _GRID = "#000001", "#000002", "#000003"
_SERIES = ("#000011", "#000012", "#000013", "#000014")
_CSS = {_INK: "--ink", _MUTED: "--muted", _GRID: "--grid"} | {c: f"--s{i + 1}" for i, c in enumerate(_SERIES)}
_MAX_POINTS = 240  # more than a figure 330 points wide can show
_FIGURE_WIDTH = 4.6  # inches of 72 points


@dataclasses.dataclass(frozen=True)
class Series:
    """One curve: `style` is "line", "dots" (a mark at each point) or "raw" (faint, with its running mean)."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    color: int = 0
    style: str = "line"


@dataclasses.dataclass(frozen=True)
class Reference:
    """A horizontal line to compare with, e.g. a baseline."""

    label: str
    y: float


@dataclasses.dataclass(frozen=True)
class Bar:
    """One bar; `faint` marks the one that the next is compared with."""

    label: str
    height: float
    color: int = 0
    faint: bool = False


@dataclasses.dataclass(frozen=True)
class Panel:
    """One pair of axes; `y_label` ends with the unit; `from_zero` starts the y axis at 0."""

    y_label: str
    series: tuple[Series, ...]
    references: tuple[Reference, ...] = ()
    from_zero: bool = False


def thin(x: Sequence[float], y: Sequence[float], limit: int = _MAX_POINTS) -> tuple[list[float], list[float]]:
    """At most `limit` points, each the mean of a run of neighbours; non-finite values are left out."""
    points = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(b)]
    size = max(1, math.ceil(len(points) / limit))
    groups = [points[i:i + size] for i in range(0, len(points), size)]
    return [sum(a for a, _ in g) / len(g) for g in groups], [sum(b for _, b in g) / len(g) for g in groups]


def running_mean(y: Sequence[float], width: int) -> list[float]:
    """Centred mean over `width` neighbours (fewer at the ends)."""
    half = width // 2
    windows = [y[max(0, i - half):i + half + 1] for i in range(len(y))]
    return [sum(window) / len(window) for window in windows]


@functools.lru_cache(maxsize=256)
def line_plot(name: str, panels: tuple[Panel, ...], x_label: str = "optimizer step", log_x: bool = False) -> str:
    """<svg> of panels under one another over a common x axis; `name` makes its ids unique within a page."""
    def draw(figure) -> None:
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for index, (axis, panel) in enumerate(zip(axes, panels, strict=True)):
            _draw_panel(axis, panel, index)
        axes[-1].set_xlabel(x_label)
        if log_x:
            _log_axis(axes[-1])

    return _render(name, 2.75 if len(panels) == 1 else 1.75 * len(panels), draw)


def _draw_panel(axis, panel: Panel, index: int) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for series in panel.series:
        x, y = thin(series.x, series.y)
        color = _SERIES[series.color % len(_SERIES)]
        dash = "-" if series.color < len(_SERIES) else (0, (3, 1.5))  # the colours come round again
        if series.style == "raw" and len(y) >= 20:
            axis.plot(x, y, color=color, alpha=0.25, linewidth=0.8)
            y = running_mean(y, max(3, len(y) // 20))
        marker = "o" if series.style == "dots" and len(y) <= 60 else None
        marker = "o" if len(y) == 1 else marker
        axis.plot(
            x, y, color=color, linewidth=1.7, linestyle=dash, marker=marker, markersize=3.2, label=series.label
        )
    for number, reference in enumerate(panel.references):
        axis.axhline(reference.y, color=_MUTED, linewidth=1.1, linestyle=(0, (4, 3)))
        axis.annotate(
            reference.label, (1, reference.y), xycoords=("axes fraction", "data"), xytext=(-2, 3),
            textcoords="offset points", ha="right", va="bottom", color=_MUTED, fontsize=9.5,
            gid=f"halo-{index}-{number}",  # the page's style sheet outlines these labels where curves run under them
        )
    axis.margins(y=0.12)
    if panel.from_zero:
        axis.set_ylim(0, 1.12 * axis.dataLim.y1)
    axis.set_ylabel(panel.y_label)
    axis.yaxis.set_major_locator(MaxNLocator(5))
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axis.grid(axis="y", color=_GRID, linewidth=0.7)
    if len(panel.series) > 1:
        axis.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.99), ncols=4, columnspacing=1.2, handlelength=1.4)


def _log_axis(axis) -> None:
    """A logarithmic x axis with a few round numbers on it, 2e+11 for 200 thousand million."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_xscale("log")
    low, high = axis.get_xlim()
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,), numticks=8))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


@functools.lru_cache(maxsize=256)
def bar_plot(name: str, bars: tuple[Bar, ...], y_label: str) -> str:
    """<svg> of vertical bars from zero, each with its value above it."""
    def draw(figure) -> None:
        axis = figure.subplots()
        for i, bar in enumerate(bars):
            color = _SERIES[bar.color % len(_SERIES)]
            axis.bar(i, bar.height, width=0.62, color=color, alpha=0.4 if bar.faint else 1.0)
            axis.annotate(f"{bar.height:.1f}", (i, bar.height), xytext=(0, 3), textcoords="offset points", ha="center")
        axis.set_xticks(range(len(bars)), [bar.label for bar in bars])
        axis.tick_params(axis="x", length=0, labelcolor=_INK)
        axis.set_ylabel(y_label)
        axis.set_xlim(-0.7, len(bars) - 0.3)
        axis.set_ylim(0, 1.12 * max([1e-9, *(bar.height for bar in bars)]))
        axis.grid(axis="y", color=_GRID, linewidth=0.7)

    return _render(name, 2.75, draw)


@functools.lru_cache(maxsize=256)
def heat_map(
    name: str, values: tuple[tuple[float, ...], ...], row_label: str, column_label: str, strongest: float
) -> str:
    """Cells whose strength grows with the value up to `strongest`; values are written in when there are few.

    Args:
        values: [rows][columns], non-negative.
    """
    rows, columns = len(values), max(len(row) for row in values)

    def draw(figure) -> None:
        from matplotlib.patches import Rectangle

        axis = figure.subplots()
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                alpha = 0.04 + 0.66 * min(1.0, max(0.0, value / strongest))
                axis.add_patch(Rectangle((j + 0.03, i + 0.04), 0.94, 0.92, color=_SERIES[0], alpha=alpha, linewidth=0))
                if rows * columns <= 160 and columns <= 16:
                    axis.text(j + 0.5, i + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=9, color=_INK)
        axis.set_xlim(0, columns)
        axis.set_ylim(rows, 0)
        for ticks, n in ((axis.set_xticks, columns), (axis.set_yticks, rows)):
            shown = range(0, n, math.ceil(n / 16))
            ticks([i + 0.5 for i in shown], [str(i) for i in shown])
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        axis.set_xlabel(column_label)
        axis.set_ylabel(row_label)

    return _render(name, min(6.0, max(1.5, 0.36 * rows + 0.8)), draw)


def _render(name: str, height: float, draw) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False, "text.color": _INK,
        "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 10, "axes.labelsize": 10,
        "axes.edgecolor": _GRID, "axes.labelcolor": _MUTED, "xtick.color": _MUTED, "ytick.color": _MUTED,
        "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "xtick.major.size": 3,
        "ytick.major.size": 0, "legend.frameon": False, "legend.fontsize": 10, "legend.labelcolor": _INK,
        "axes.axisbelow": True, "lines.solid_capstyle": "round", "axes.xmargin": 0.02, "axes.unicode_minus": True,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(_FIGURE_WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_page(buffer.getvalue(), name)


def _for_page(svg: str, name: str) -> str:
    """Cuts a stand-alone SVG down to what a page needs: no prolog or metadata, ids of its own, colours by variable."""
    svg = svg[svg.index("<svg"):]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->|<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r"#0000[0-9a-f]{2}", lambda match: f"var({_CSS.get(match[0], '--ink')})", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"font-family: [^;\"]*; ?| transform=\"rotate\(-0 [^\"]*\"", "", svg)
    svg = re.sub(r"(\d\.\d\d)\d+", r"\1", svg)  # a hundredth of a point is finer than any screen
    return re.sub(r"\s*\n\s*", " ", svg).strip()
