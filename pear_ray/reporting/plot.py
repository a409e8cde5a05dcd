"""Drawing: matplotlib figures as inline SVG whose colours the page's style sheet decides."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# matplotlib wants fixed colours; each stands for a CSS variable that differs in dark mode.
_NAMES = ("ink", "muted", "grid", "grey", "blue", "orange", "green", "purple", "alert", "page")
NUM_RUN_COLOURS = 7  # of runs side by side, after Okabe and Ito (2008); more get other dashes
DASHES = ("", "6 3", "1.5 2", "7 2 1.5 2")  # so that a run's line repeats after 28 runs
_SENTINELS = {
    name: f"#{i:02x}{i:02x}{i:02x}"
    for i, name in enumerate((*_NAMES, *(f"run{k}" for k in range(NUM_RUN_COLOURS))), start=1)
}
INK, MUTED, GRID, GREY, BLUE, ORANGE, GREEN, PURPLE, ALERT, PAGE, *_ = _SENTINELS.values()
STYLE = {
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's font
    "font.size": 9.0,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.prop_cycle": f"cycler('color', ['{INK}'])",  # what nothing else colours
    "lines.linewidth": 1.6,
    "lines.markersize": 3.5,
}
_MARKED_POINTS = 30  # few points want to be seen one by one; many make a line
WIDTH_IN, HEIGHT_IN = 5.6, 3.1
_MARGIN = 0.125  # holds tick labels of six characters and the axis label
_BOTTOM_IN = 0.48  # holds tick labels and the axis label
_TOP = 0.97  # of the axes
_LEGEND_TOP, _LEGEND_ROW = 0.96, 0.05  # with a legend: less for each of its rows
_LEGEND_ROW_CHARS, _HANDLE_CHARS = 76, 5  # as many as fit above a figure; a line sample's share
_LABEL_CHARS = 24  # of a name that a run gives
_SPIKE = 20.0  # medians high: what lies around the median is then within a twentieth of the axis


@dataclass(frozen=True, slots=True)
class Chart:
    """A figure ready for the page."""

    title: str
    svg: str
    caption: str


@dataclass(frozen=True, slots=True)
class Line:
    """One series of a line chart; NaN values leave gaps.

    Attributes:
        band: Lower and upper ends of a band around it.
    """

    label: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    colour: str
    dashes: str = "-"
    band: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None


@dataclass(frozen=True, slots=True)
class Threshold:
    """A level that a series should stay below (or above), drawn dashed and named."""

    label: str
    value: float


def new_axes(
    *, x_label: str, y_label: str, wide: bool = False, height_in: float = HEIGHT_IN
) -> tuple["Figure", "Axes"]:
    """An empty styled chart with its axes; `wide` spans the page."""
    import matplotlib as mpl  # noqa: PLC0415 - half a second that other stages do not pay
    from matplotlib.figure import Figure  # noqa: PLC0415

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN * (2 if wide else 1), height_in))
        # Fixed margins: measuring every text for a layout would double the time to draw.
        margin = _MARGIN / 2 if wide else _MARGIN
        figure.subplots_adjust(left=margin, right=0.985, bottom=_BOTTOM_IN / height_in, top=_TOP)
        axes = figure.add_subplot()
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
    return figure, axes


def chart(figure: "Figure", *, title: str, caption: str) -> Chart:
    """`figure` as inline SVG under `title`, explained by `caption`."""
    import matplotlib as mpl  # noqa: PLC0415

    buffer = io.StringIO()
    # The salt keeps the ids of clip paths apart when many figures share one page.
    with mpl.rc_context(STYLE | {"svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return Chart(title, _inline(buffer.getvalue(), title), caption)


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    caption: str,
    x_label: str,
    y_label: str,
    thresholds: Sequence[Threshold] = (),
    log: bool = False,
    from_zero: bool = False,
) -> Chart:
    """Series over a common x axis, with thresholds."""
    figure, axes = new_axes(x_label=x_label, y_label=y_label)
    for line in lines:
        marker = "o" if len(line.x) <= _MARKED_POINTS else ""
        axes.plot(line.x, line.y, line.dashes, marker=marker, color=line.colour, label=line.label)
        if line.band:
            axes.fill_between(line.x, *line.band, color=line.colour, alpha=0.2, linewidth=0)
    axes.margins(y=0.12)
    if log:
        log_axis(axes)
    highest = max((threshold.value for threshold in thresholds), default=0.0)
    for threshold in thresholds:  # two may lie close together: only the highest is named above
        draw_threshold(axes, threshold, name_above=threshold.value == highest)
    if from_zero:
        axes.set_ylim(0, axes.get_ylim()[1] * 1.05)
    whole_steps(axes)
    if len(lines) > 1:
        legend(axes)
    return chart(figure, title=title, caption=caption)


def run_style(place: int) -> tuple[str, str]:
    """The style sheet's name of the colour of the run at `place`, and its dashes in SVG's words."""
    return f"run{place % NUM_RUN_COLOURS}", DASHES[place // NUM_RUN_COLOURS % len(DASHES)]


def run_colour(place: int) -> str:
    """The colour of the run at `place`, to draw with."""
    return _SENTINELS[run_style(place)[0]]


def log_axis(axes: "Axes", *, along: Literal["x", "y"] = "y") -> None:
    """A logarithmic axis whose ticks are plain text."""
    from matplotlib.ticker import FuncFormatter, NullFormatter  # noqa: PLC0415

    (axes.set_xscale if along == "x" else axes.set_yscale)("log")
    axis = axes.xaxis if along == "x" else axes.yaxis
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def whole_steps(axes: "Axes") -> None:
    """No tick at half a step."""
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))


def draw_threshold(axes: "Axes", threshold: Threshold, *, name_above: bool = True) -> None:
    """A dashed level with its name at the right end, above or below it."""
    axes.axhline(threshold.value, color=ALERT, linestyle=(0, (5, 3)), linewidth=1.1)
    axes.annotate(
        threshold.label,
        (1.0, threshold.value),
        xycoords=("axes fraction", "data"),
        xytext=(-2, 3 if name_above else -3),
        textcoords="offset points",
        ha="right",
        va="bottom" if name_above else "top",
        color=ALERT,
        fontsize=8,
        bbox={"facecolor": PAGE, "edgecolor": "none", "alpha": 0.75, "pad": 0.5},
    )


def note(axes: "Axes", text: str, at: tuple[float, float], *, beside: bool) -> None:
    """A number beside the end of a lying bar, or above that of a standing one."""
    axes.annotate(
        text,
        at,
        xytext=(4, 0) if beside else (0, 3),
        textcoords="offset points",
        ha="left" if beside else "center",
        va="center" if beside else "bottom",
        color=INK,
        fontsize=8,
    )


def name_bars(axes: "Axes", values: Sequence[float], *, unit: str = "") -> None:
    """Lying bars from top to bottom, each with its number."""
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.15)
    for row, value in enumerate(values):
        note(axes, f"{value:,.0f}{unit}", (value, row), beside=True)


def legend(axes: "Axes") -> None:
    """Names above the plot, where they can hide nothing."""
    labels = axes.get_legend_handles_labels()[1]
    if not labels:
        return
    widths = [len(label) + _HANDLE_CHARS for label in labels]
    in_one_row = sum(widths) <= _LEGEND_ROW_CHARS
    columns = len(labels) if in_one_row else max(1, _LEGEND_ROW_CHARS // max(widths))
    rows = -(-len(labels) // columns)
    axes.figure.subplots_adjust(top=_LEGEND_TOP - _LEGEND_ROW * rows)
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=columns,
        fontsize=8,
        frameon=False,
        labelcolor=INK,
        handlelength=1.8,
        borderaxespad=0.2,
        columnspacing=1.2,
    )


def has_spikes(values: NDArray[np.float64]) -> bool:
    """Whether a few positive values would flatten all others on a linear axis."""
    known = values[np.isfinite(values)]
    if not len(known) or known.min() <= 0:
        return False
    return bool(known.max() > _SPIKE * np.median(known))


def plain_label(name: str) -> str:
    """A name of the run's as a legend takes it: short, not hidden by an underscore."""
    short = name if len(name) <= _LABEL_CHARS else f"…{name[1 - _LABEL_CHARS :]}"
    return f" {short}" if short.startswith("_") else short


def running_mean(values: NDArray[np.float64], *, window: int) -> NDArray[np.float64]:
    """Centred mean over `window` values, fewer at the ends; NaN values are left out."""
    known = np.isfinite(values)
    kernel = np.ones(window)
    sums = np.convolve(np.where(known, values, 0.0), kernel)
    counts = np.convolve(known.astype(np.float64), kernel)
    start = (window - 1) // 2
    middle = slice(start, start + len(values))
    with np.errstate(invalid="ignore"):
        return sums[middle] / counts[middle]


def _inline(svg: str, title: str) -> str:
    """The bare `<svg>` element: no prolog, no size of its own, CSS variables for colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="(run-\d+)"', r'<g class="run \1"', svg)  # which a page can single out
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # never referenced, and not unique on a page
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href", "href").replace("'DejaVu Sans'", "system-ui")
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
    for name, sentinel in _SENTINELS.items():
        svg = svg.replace(sentinel, f"var(--{name})")
    return svg
