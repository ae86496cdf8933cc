"""How our pictures are drawn: their style, their axes, and how they become part of a page or a file of their own.

In a page a figure is inline SVG: it holds no words of the user's (titles and class names stand in the page around it),
its letters are real text in the page's own font, and its colours are CSS variables, so it follows the page into dark
mode and print. The number of marks stays small, whatever the number of classes.
"""

import io
import re
import textwrap
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from numpy.typing import NDArray

from analysis.page import LIGHT
from shards.groups import FEW_BELOW, GROUPS, MANY_ABOVE, class_groups

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    "svg.hashsalt": "tailstream",
    "font.size": 9,
    "text.color": LIGHT["muted"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.edgecolor": LIGHT["rule"],
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LIGHT["rule"],
    "grid.linewidth": 0.7,
    "xtick.color": LIGHT["rule"],
    "ytick.color": LIGHT["rule"],
    "xtick.labelcolor": LIGHT["muted"],
    "ytick.labelcolor": LIGHT["muted"],
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "figure.facecolor": "none",
    "figure.constrained_layout.use": True,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    "lines.solid_capstyle": "round",
    "path.simplify_threshold": 0.5,
}
PERCENT_TOP = 104  # room for a line at 100 %


def styled() -> AbstractContextManager[None]:
    """Draw in our style, whatever the user's own is."""
    return style.context(_STYLE, after_reset=True)


def canvas(width: float, height: float, label: str) -> tuple[Figure, Axes]:
    """Make a figure of so many inches, and its only axes; the label says what is drawn, for a screen reader."""
    figure = Figure(figsize=(width, height))
    figure.set_label(label)
    return figure, figure.add_subplot()


def percent_axis(ax: Axes) -> None:
    """Let y go from 0 to 100 %."""
    ax.set_ylim(0, PERCENT_TOP)
    ax.set_yticks(range(0, 101, 20), [f"{tick} %" for tick in range(0, 101, 20)])


def thousands(value: float, _: object) -> str:
    """Write a tick such as 1,000."""
    return f"{value:,.0f}"


def log_ticks(axis: Any, low: float, high: float) -> None:
    """Label 1, 10, 100, …, with 2 and 5 between them over less than two decades."""
    steps = (1, 2, 5) if high < 100 * low else (1,)
    ticks = [step * 10**power for power in range(10) for step in steps]
    axis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axis.set_major_formatter(FuncFormatter(thousands))
    axis.set_minor_locator(NullLocator())


def shade_groups(ax: Axes, low: float, high: float) -> None:
    """Shade few, medium and many along x, training images of a class from `low` to `high`."""
    borders = (low, FEW_BELOW - 0.5, MANY_ABOVE + 0.5, high)
    for group, left, right in zip(reversed(GROUPS), borders, borders[1:], strict=False):
        left, right = max(left, low), min(right, high)
        if left < right:
            ax.axvspan(left, right, color=LIGHT[group], alpha=0.22, linewidth=0, zorder=0)
            if np.log(right / left) > 0.1 * np.log(high / low):
                ax.text(np.sqrt(left * right), 0.015 * ax.get_ylim()[1], group, ha="center")


def shade_ranks(ax: Axes, counts_C: NDArray[np.int64]) -> None:
    """Shade many, medium and few along x, where classes stand from the largest (1) to the smallest (C)."""
    groups_C = class_groups(np.sort(counts_C)[::-1])
    top = ax.get_ylim()[1]
    for group in GROUPS:
        mine = np.flatnonzero(groups_C == group)
        if len(mine):
            left, right = mine[0] + 0.5, mine[-1] + 1.5
            ax.axvspan(left, right, color=LIGHT[group], alpha=0.22, linewidth=0, zorder=0)
            if right - left > 0.1 * len(counts_C):
                ax.text((left + right) / 2, 0.02 * top, group, ha="center")


def inline_svg(figure: Figure) -> str:
    """Return a figure as SVG for a page."""
    buffer = io.StringIO()
    with styled():
        figure.savefig(buffer, format="svg")
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # The metadata holds the date, and the page shall be the same every time.
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r' id="[a-zA-Z0-9.]+_\d+"', "", svg)  # names of groups, alike in every figure
    svg = svg.replace('id="value"', 'class="value"')
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    for name, colour in LIGHT.items():
        svg = svg.replace(colour, f"var(--{name})")
    width, height = re.findall(r'(?:width|height)="([\d.]+)pt"', svg)
    svg = svg.replace(f' width="{width}pt"', "").replace(f' height="{height}pt"', "")
    return svg.replace("<svg", f'<svg role="img" aria-label="{figure.get_label()}"', 1)


def alone(figure: Figure, titles: Sequence[str], file_format: str) -> bytes:
    """Return a figure as a file of its own, SVG or PDF, with a legend of the entries' titles."""
    with styled(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ ")  # of a title: a letter that the font lacks
        if len(titles) > 1:
            _add_legend(figure, titles)
        buffer = io.BytesIO()
        # The same file every time: no date, and names that depend on the content alone.
        dated = {"svg": "Date", "pdf": "CreationDate"}[file_format]
        figure.savefig(buffer, format=file_format, metadata={dated: None})
    return buffer.getvalue()


def _add_legend(figure: Figure, titles: Sequence[str]) -> None:
    """Add a legend of entries above a figure, which grows by it, in as many columns as fit; of long titles in lines."""
    handles = [Line2D([], [], color=LIGHT[f"entry{i}"], linewidth=4) for i in range(len(titles))]
    renderer = FigureCanvasAgg(figure).get_renderer()
    tries = [(columns, list(titles)) for columns in range(min(3, len(titles)), 0, -1)]
    tries += [(1, [textwrap.fill(title, letters) for title in titles]) for letters in range(60, 10, -10)]
    for columns, shown in tries:
        legend = figure.legend(handles, shown, loc="outside upper left", ncols=columns, frameon=False, fontsize=8)
        for text in legend.get_texts():
            text.set_parse_math(False)  # titles are the user's
        if legend.get_window_extent(renderer).width <= figure.bbox.width or shown is tries[-1][1]:
            break
        legend.remove()
    width, height = figure.get_size_inches()
    further = sum(title.count("\n") for title in shown)
    figure.set_size_inches(width, height + 0.25 * -(-len(titles) // columns) + 0.14 * further)
