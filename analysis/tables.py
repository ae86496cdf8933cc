"""A comparison as text: for the terminal, Markdown, CSV, LaTeX or JSON; for HTML see analysis.comparison."""

import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from unicodedata import category

from analysis.compare import Entry, Spread
from analysis.metrics import percent, points
from analysis.predictions import Differences, Interval
from analysis.runs import METRICS

# The differences that tables show, by the key of their interval.
COMPARED = {"balanced_accuracy": "balanced", "few": "few"}


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        title: the entry's, or the name of what it measured itself against.
        figures: its figures after the last epoch.
        n: how many seeds these are means of.
        beside: of what an entry measured itself against, that entry's title; else None.
        versus: intervals of the differences from the table's first entry; empty where they are not known.
    """

    title: str
    figures: Spread
    n: int
    beside: str | None
    versus: dict[str, Interval]


@dataclass(frozen=True)
class Block:
    """The table of one dataset.

    Attributes:
        dataset: its name.
        rows: its lines.
        first: the title of the first entry, which the others are compared with; None where they are not.
        several: whether some line is a mean over several seeds.
    """

    dataset: str
    rows: list[Row]
    first: str | None
    several: bool

    @property
    def note(self) -> str:
        """What the figures are."""
        return "%, last epoch" + ("; ± standard deviation over n seeds" if self.several else "")

    @property
    def columns(self) -> list[str]:
        """The headings behind the title's."""
        versus = [f"{name} vs {self.first}" for name in COMPARED.values()] if self.first else []
        return [*METRICS.values(), "n", *versus]

    def cells(self, row: Row, plus_minus: str = "±", sign: Callable[[str], str] = str) -> list[str]:
        """Return a line's cells behind its title."""
        figures = [with_spread(row.figures, key, plus_minus) for key in METRICS]
        versus = [sign(interval_text(row.versus.get(key))) for key in COMPARED] if self.first else []
        return [*figures, str(row.n), *versus]


def blocks(entries: Sequence[Entry], baselines: bool = False, versus: Differences | None = None) -> list[Block]:
    """Arrange entries in a table per dataset.

    Args:
        entries: in order.
        baselines: whether what an entry's runs measured themselves against stands under it.
        versus: differences from each dataset's first entry.
    """
    found = []
    for dataset in dict.fromkeys(entry.dataset for entry in entries):
        mine = [entry for entry in entries if entry.dataset == dataset]
        rows = []
        for entry in mine:
            n = len(entry.replicates)
            rows.append(Row(entry.title, entry.last, n, None, (versus or {}).get((dataset, entry.title), {})))
            if baselines:
                rows += [
                    Row(name, figures, entry.measured(name), entry.title, {})
                    for name, figures in entry.baselines.items()
                ]
        first = mine[0].title if any(row.versus for row in rows) else None
        found.append(Block(dataset, rows, first, any(row.n > 1 for row in rows)))
    return found


def with_spread(figures: Spread, key: str, plus_minus: str = "±") -> str:
    """Write a mean in percent, with its standard deviation where there is one."""
    std = figures.std[key]
    return percent(figures.mean[key]) + ("" if std is None else f"{plus_minus}{percent(std)}")


def interval_text(interval: Interval | None) -> str:
    """Write a difference in points with its bounds: "+1.9 [0.4, 3.3]"; empty for None."""
    return "" if interval is None else f"{points(interval.estimate)} {bounds_text(interval)}"


def bounds_text(interval: Interval) -> str:
    """Write the bounds of an interval in points: "[0.4, 3.3]"."""
    return f"[{', '.join(points(bound).lstrip('+') for bound in (interval.low, interval.high))}]"


def table(tables: Sequence[Block]) -> str:
    """Draw plain text; a line fits 80 columns up to a long title. Differences from the first stand in a second table.

    digits: %, last epoch; ± standard deviation over n seeds

                overall      many    medium       few  balanced       ECE  n
    CE         84.2±0.5  98.9±0.2  88.1±0.4  61.0±1.2  84.2±0.5   6.1±0.3  3
    BBN            86.0      98.1      89.3      70.4      86.0       5.0  1
    """
    return "\n\n".join(_text(block) for block in tables)


def _text(block: Block) -> str:
    names = ["  " * bool(row.beside) + plain(row.title) for row in block.rows]
    columns = [["", *names]]
    for key, heading in METRICS.items():
        spreads = ["" if row.figures.std[key] is None else f"±{percent(row.figures.std[key])}" for row in block.rows]
        width = max(map(len, spreads))
        means = [percent(row.figures.mean[key]) for row in block.rows]
        columns.append([heading, *(mean + s.ljust(width) for mean, s in zip(means, spreads, strict=True))])
    columns.append(["n", *(str(row.n) for row in block.rows)])
    text = f"{plain(block.dataset)}: {block.note}\n\n{_aligned(columns)}"
    if block.first:
        compared = [(name, row) for name, row in zip(names, block.rows, strict=True) if row.versus]
        columns = [["", *(name for name, _ in compared)]]
        for key, heading in COMPARED.items():
            columns.append([heading, *(interval_text(row.versus.get(key)) for _, row in compared)])
        text += f"\n\nvs {plain(block.first)}: points [95 % interval over test images]\n\n{_aligned(columns)}"
    return text


def _aligned(columns: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in columns]
    return "\n".join(
        "  ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]).rstrip()
        for cells in zip(*columns, strict=True)
    )


_ACTED_ON = ("Cc", "Cs", "Zl", "Zp")  # control codes, surrogates, line and paragraph breaks
_TURNS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # the direction of what follows


def plain(text: str) -> str:
    """Return a name on one line, without what a terminal would act on."""
    return "".join("�" if category(letter) in _ACTED_ON or letter in _TURNS else letter for letter in text)


def markdown(tables: Sequence[Block]) -> str:
    """Draw Markdown tables."""

    def escaped(text: str) -> str:
        return re.sub(r"([\\`*_{}\[\]<>|#~&])", r"\\\1", plain(text))

    drawn = []
    for block in tables:
        lines = [["", *map(escaped, block.columns)], ["---", *["--:"] * len(block.columns)]]
        lines += [["&ensp;" * bool(row.beside) + escaped(row.title), *block.cells(row)] for row in block.rows]
        body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        drawn.append(f"**{escaped(block.dataset)}**: {_explained(block)}\n\n{body}")
    return "\n\n".join(drawn)


def _explained(block: Block) -> str:
    return block.note + ("; differences in points [95 % interval over test images]" if block.first else "")


_LATEX = {
    **{letter: rf"\{letter}" for letter in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "–": "--",
    "…": r"\ldots{}",
    "α": r"$\alpha$",
    "β": r"$\beta$",
    "τ": r"$\tau$",
    "±": r"$\pm$",
    "−": "$-$",
    "×": r"$\times$",
}


def latex(tables: Sequence[Block]) -> str:
    """Draw LaTeX tables in the style of booktabs."""

    def escaped(text: str) -> str:
        return "".join(_LATEX.get(letter, letter) for letter in plain(text))

    def minus(text: str) -> str:
        return text.replace("−", "$-$")

    drawn = ["% \\usepackage{booktabs}"]
    for block in tables:
        head = [
            rf"% {plain(block.dataset)}: {_explained(block)}",
            rf"\begin{{tabular}}{{l{'r' * len(block.columns)}}}",
        ]
        lines = [" & ".join(["", *map(escaped, block.columns)]) + r" \\", r"\midrule"]
        for row in block.rows:
            title = r"\quad " * bool(row.beside) + escaped(row.title)
            cells = [cell.replace("–", "--") for cell in block.cells(row, r" $\pm$ ", minus)]
            lines.append(" & ".join([title, *cells]) + r" \\")
        drawn.append("\n".join([*head, r"\toprule", *lines, r"\bottomrule", r"\end{tabular}"]))
    return "\n\n".join(drawn)


def comma_separated(tables: Sequence[Block]) -> str:
    """Write one CSV table of fractions, empty where unmeasured: means, standard deviations and differences."""
    columns = ["dataset", "title", "baseline_of", "n"]
    columns += [name for key in METRICS for name in (key, f"{key}_std")]
    columns += [f"{key}_vs_first{end}" for key in COMPARED for end in ("", "_low", "_high")]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for block in tables:
        for row in block.rows:
            line: dict[str, Any] = {"dataset": block.dataset, "title": row.title, "n": row.n}
            line["baseline_of"] = row.beside or ""
            for key in METRICS:
                line |= {key: row.figures.mean[key], f"{key}_std": row.figures.std[key]}
            for key, interval in row.versus.items():
                if key in COMPARED:
                    ends = {"": interval.estimate, "_low": interval.low, "_high": interval.high}
                    line |= {f"{key}_vs_first{end}": value for end, value in ends.items()}
            writer.writerow(line)
    return text.getvalue().rstrip("\n")


def json_row(entry: Entry, versus: Differences | None = None) -> dict[str, Any]:
    """Return an entry ready for JSON: `mean` and `std` of its last figures, and of its `baselines` by name.

    Where the differences from the dataset's first entry are known, `vs_first` has their intervals.
    """
    baselines = {name: asdict(figures) for name, figures in entry.baselines.items()}
    known = {"dataset": entry.dataset, "title": entry.title, "seeds": entry.seeds, "n": len(entry.replicates)}
    of = (versus or {}).get((entry.dataset, entry.title), {})
    compared = {"vs_first": {key: asdict(interval) for key, interval in of.items()}} if of else {}
    return known | asdict(entry.last) | {"baselines": baselines} | compared


def json_text(entries: Sequence[Entry], versus: Differences) -> str:
    """Write all entries as JSON."""
    return json.dumps([json_row(entry, versus) for entry in entries], indent=2, ensure_ascii=False)


FORMATS: dict[str, Callable[[Sequence[Block]], str]] = {
    "table": table,
    "markdown": markdown,
    "csv": comma_separated,
    "latex": latex,
}
