"""The commands `python -m analysis compare`, `report`, `figure` and `ensemble`."""

import os
import sys
from pathlib import Path
from typing import Literal, get_args

from jsonargparse import Namespace

from analysis.compare import group_runs, mismatches, repeated_runs
from analysis.comparison import comparison
from analysis.ensemble import ensemble_table
from analysis.predictions import differences
from analysis.runs import read_finished_runs, read_runs
from analysis.settings import unknown_stage_ones
from analysis.tables import FORMATS, blocks, json_text, plain
from shards.cli import Parser, program_name
from shards.errors import user_errors_exit_2

# As in analysis.gallery, which loads slowly.
FigureName = Literal[
    "class-counts",
    "groups",
    "class-size",
    "loss",
    "accuracy",
    "tail-accuracy",
    "learning-rate",
    "alpha",
    "reliability",
    "confusion",
    "weight-norms",
    "compactness",
    "beta",
    "features",
]


def main(argv: list[str] | None = None) -> None:
    """Run one command; a user's mistake exits with status 2."""
    comparing = Parser(description="Tabulate finished runs by method: mean and standard deviation over seeds.")
    comparing.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of finished runs")
    comparing.add_argument(
        "--baselines", action="store_true", help="also show what stage two measured itself against, where it did"
    )
    comparing.add_argument(
        "--format",
        type=Literal["table", "markdown", "csv", "latex", "html", "json"],
        default="table",
        help="csv and json hold fractions, html is a page with sortable columns, json has baselines always",
    )
    comparing.add_argument("--json", action="store_true", help="the same as --format json")
    reporting = Parser(
        description="Write one self-contained HTML page about finished runs, averaged by method over seeds;"
        " the first of stage one is the baseline."
    )
    reporting.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of finished runs")
    reporting.add_argument(
        "--out", type=Path | None, metavar="FILE", help="default: report.html in the run or beside the runs"
    )

    drawing = Parser(description="Draw one figure of finished runs as a file, for a paper.")
    drawing.add_argument("name", metavar="NAME", type=FigureName, help=f"one of: {', '.join(get_args(FigureName))}")
    drawing.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of finished runs")
    drawing.add_argument("--out", type=Path, required=True, metavar="FILE", help="ends in .svg or .pdf")

    averaging = Parser(description="Average the probabilities of several runs and show what that recognises.")
    averaging.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of finished runs")

    program = program_name("python -m analysis")
    parser = Parser(prog=program, description="Tables and reports from the files of runs.")
    commands = parser.add_subcommands(dest="command")
    commands.add_subcommand("compare", comparing)
    commands.add_subcommand("report", reporting)
    commands.add_subcommand("figure", drawing)
    commands.add_subcommand("ensemble", averaging)
    options = parser.parse_args(argv)

    try:
        with user_errors_exit_2(program):
            run(options)
            sys.stdout.flush()
    except BrokenPipeError:  # whoever reads the output has seen enough, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def run(options: Namespace) -> None:
    """Run the command that parsed options name."""
    if options.command == "ensemble":
        runs = read_runs(options.ensemble.runs)
        for note in mismatches(runs):
            print(f"note: {plain(note)}", file=sys.stderr)
        print(ensemble_table(runs))
        return
    runs, notes = read_finished_runs(options[options.command].runs)
    entries = group_runs(runs)
    for note in notes + unknown_stage_ones(runs) + repeated_runs(entries) + mismatches(runs):
        print(f"note: {plain(note)}", file=sys.stderr)
    if options.command == "report":
        from analysis.report import write_report  # matplotlib loads slowly, and a table needs none

        print(write_report(runs, options.report.out))
    elif options.command == "figure":
        from analysis.gallery import write_figure

        print(write_figure(options.figure.name, runs, options.figure.out))
    else:
        versus, notes = differences(entries)
        for note in notes:
            print(f"note: {plain(note)}", file=sys.stderr)
        if options.compare.json or options.compare.format == "json":
            print(json_text(entries, versus))
        elif options.compare.format == "html":
            print(comparison(entries, versus, options.compare.baselines))
        else:
            print(FORMATS[options.compare.format](blocks(entries, options.compare.baselines, versus)))


if __name__ == "__main__":
    main()
