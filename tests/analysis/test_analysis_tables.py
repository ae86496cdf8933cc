"""A comparison in every format: the same figures, whatever the names."""

import csv
import io
import json
import re

import pytest

from analysis.__main__ import main
from analysis.compare import group_runs
from analysis.comparison import comparison
from analysis.predictions import differences
from analysis.runs import read_runs
from analysis.tables import FORMATS, blocks, comma_separated, json_text, latex, markdown, table

NASTY = "<script>alert('x')</script> | \\ {} $x^2$ & 100 % _a_\n`b`\x1b[31m"


@pytest.fixture
def compared(make_run):
    """CE over two seeds, BBN over one, both with predictions."""
    paths = [make_run(f"ce{seed}", title="CE", recall=0.3, seed=seed, predictions=True) for seed in range(2)]
    entries = group_runs(read_runs([*paths, make_run("bbn", recall=0.9, predictions=True)]))
    versus, notes = differences(entries)
    assert notes == []
    return entries, versus


@pytest.fixture
def nasty(make_run):
    paths = [make_run(str(i), title=f"{NASTY}{i}", dataset=NASTY, predictions=True, recall=i / 2) for i in range(2)]
    return group_runs(read_runs(paths))


def test_the_table_shows_differences_with_their_intervals(compared):
    entries, versus = compared
    lines = table(blocks(entries, versus=versus)).splitlines()
    assert lines[6:9] == ["vs CE: points [95 % interval over test images]", "", lines[8]]
    assert lines[8].split() == ["balanced", "few"]
    number = r"[+−]?\d+\.\d"
    assert re.fullmatch(rf"BBN +{number} \[{number}, {number}\] +{number} \[{number}, {number}\]", lines[9])
    few = 100 * (entries[1].last.mean["few"] - entries[0].last.mean["few"])
    assert f"+{few:.1f} [" in lines[9]
    assert len(lines) == 10
    assert all(len(line) <= 80 for line in lines)


def test_without_predictions_nothing_is_compared(make_run):
    entries = group_runs(read_runs([make_run("ce", title="CE"), make_run("bbn")]))
    assert differences(entries) == ({}, [])
    assert " vs " not in table(blocks(entries))
    assert "vs_first" not in json_text(entries, {})


def test_predictions_of_some_runs_only_are_noted(make_run, capsys):
    runs = [make_run("ce", title="CE", predictions=True), make_run("bbn")]
    main(["compare", *map(str, runs)])
    captured = capsys.readouterr()
    assert captured.err == ("note: not compared image by image on digits, no predictions of the same images: BBN\n")
    assert " vs " not in captured.out
    main(["compare", *map(str, runs), str(make_run("afg", title="AFG", predictions=True))])
    captured = capsys.readouterr()
    assert captured.err.endswith("no predictions of the same images: BBN\n")
    assert [line.split()[0] for line in captured.out.splitlines()[-2:]] == ["balanced", "AFG"]


def test_markdown(compared):
    entries, versus = compared
    lines = markdown(blocks(entries, versus=versus)).splitlines()
    assert lines[0].startswith("**digits**: %, last epoch; ± standard deviation over n seeds; differences in points")
    assert lines[2] == "|  | overall | many | medium | few | balanced | ECE | n | balanced vs CE | few vs CE |"
    assert lines[3].count("--:") == 9
    assert re.match(r"\| CE \| \d+\.\d±\d+\.\d \|", lines[4])
    assert {line.count("|") for line in lines[2:]} == {11}


def test_csv_holds_fractions(compared):
    entries, versus = compared
    ce, bbn = csv.DictReader(io.StringIO(comma_separated(blocks(entries, versus=versus))))
    assert (ce["title"], ce["n"], bbn["top1_std"], ce["few_vs_first"]) == ("CE", "2", "", "")
    assert float(ce["few"]) == entries[0].last.mean["few"]
    assert float(ce["few_std"]) == entries[0].last.std["few"]
    assert float(bbn["few_vs_first_low"]) < float(bbn["few_vs_first"]) < float(bbn["few_vs_first_high"])


def test_latex(compared):
    entries, versus = compared
    lines = latex(blocks(entries, versus=versus)).splitlines()
    assert r"\begin{tabular}{lrrrrrrrrr}" in lines
    rows = [line for line in lines if line.endswith(r"\\")]
    assert {row.count(" & ") for row in rows} == {9}
    assert r" $\pm$ " in rows[1]
    assert "−" not in "".join(lines)


def test_baselines_stand_in_every_format(make_run):
    figures = dict.fromkeys(("top1", "many", "medium", "few", "balanced_accuracy", "ece"), 0.5)
    rows = {"selected_on": "val", "rows": [{"name": "cRT", "setting": {}, **figures}]}
    entries = group_runs(read_runs([make_run("afg", title="AFG", baselines=rows)]))
    tables = blocks(entries, baselines=True)
    assert "&ensp;cRT" in markdown(tables)
    assert r"\quad cRT" in latex(tables)
    assert "cRT" in comparison(entries, {}, baselines=True)
    _, baseline = csv.DictReader(io.StringIO(comma_separated(tables)))
    assert (baseline["title"], baseline["baseline_of"]) == ("cRT", "AFG")


def test_json_has_the_intervals(compared):
    ce, bbn = json.loads(json_text(*compared))
    assert "vs_first" not in ce
    assert bbn["vs_first"]["few"].keys() == {"estimate", "low", "high"}
    assert (ce["n"], ce["seeds"]) == (2, [0, 1])


def test_hostile_names_stay_text(nasty):
    versus = differences(nasty)[0]
    tables, page = blocks(nasty, versus=versus), comparison(nasty, versus)
    assert page.count("<script") == 1  # our own, which holds no names
    assert "alert" not in page[page.index("<script") :]
    assert "\x1b" not in table(tables) + markdown(tables) + latex(tables)
    assert "<script" not in markdown(tables).replace("\\<script", "")
    for line in markdown(tables).splitlines()[2:]:
        assert line.replace("\\|", "").count("|") == 11
    assert r"\$x\textasciicircum{}2\$ \& 100 \% \_a\_" in latex(tables)
    assert [row["title"] for row in csv.DictReader(io.StringIO(comma_separated(tables), newline=""))] == [
        f"{NASTY}{i}" for i in range(2)
    ]


def test_the_html_page_says_what_its_figures_do_not_share(make_run):
    runs = read_runs([make_run("a"), make_run("b"), make_run("c", title="CE", evaluated_on="val")])
    page = comparison(group_runs(runs), {})
    assert "Note: BBN, on test on digits: seed 0 was run twice (a, b); their mean counts as one seed." in page
    assert "Note: the runs on digits were evaluated on test and val." in page
    assert "% of the test and val images" in page


def test_the_html_page_needs_nothing_else(compared):
    page = comparison(*compared)
    assert "http" not in page
    assert not re.search(r"<(link|img|iframe)|\bsrc=|@import|url\(", page)
    assert "data-value=" in page
    assert "BBN does better than CE (mean of 2 seeds):" in page
    assert page.count("<pre>") == 3  # each run's configuration


@pytest.mark.parametrize("name", [*FORMATS, "html", "json"])
def test_every_format_from_the_command_line(make_run, capsys, name):
    main(["compare", "--format", name, str(make_run("bbn")), str(make_run("ce", title="CE"))])
    assert "BBN" in capsys.readouterr().out


def test_no_runs_on_several_datasets_are_mixed(make_run):
    entries = group_runs(read_runs([make_run("a"), make_run("b", dataset="zebra", train_counts=[30, 7])]))
    for draw in FORMATS.values():
        assert draw(blocks(entries)).index("digits") < draw(blocks(entries)).index("zebra")


def test_latex_knows_the_letters_of_our_own_titles(make_run):
    runs = [make_run("a", title="CE + AFG, adaptive β"), make_run("b", title="logit-adjusted, τ=2")]
    text = latex(blocks(group_runs(read_runs(runs))))
    assert r"adaptive $\beta$" in text
    assert r"$\tau$=2" in text
    assert text.isascii()


def test_n_of_a_baseline_is_that_of_the_seeds_that_measured_it(make_run):
    figures = dict.fromkeys(("top1", "many", "medium", "few", "balanced_accuracy", "ece"), 0.5)
    against = {"selected_on": "val", "rows": [{"name": "cRT", "setting": {}, **figures}]}
    runs = [
        make_run("a", title="AFG", baselines=against, settings={"method.baselines": True}),
        make_run("b", title="AFG", seed=1, settings={"method.baselines": False}),
    ]
    (block,) = blocks(group_runs(read_runs(runs)), baselines=True)
    assert [row.n for row in block.rows] == [2, 1]


def test_names_keep_their_own_spaces(make_run):
    assert "東京　タワー" in table(blocks(group_runs(read_runs([make_run("a", title="東京　タワー")]))))
