"""The report: whole, self-contained, escaped, small, and right in degenerate cases."""

import html.parser
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from analysis import figures
from analysis.report import render, write_report
from analysis.runs import read_runs
from shards.errors import UserError


class Page(html.parser.HTMLParser):
    """The page's tags and visible text; fails on tags that do not nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, words = [], [], [], []
        self.words = words
        self.feed(text)
        assert self.open == []
        self.text = " ".join(" ".join(words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)


@pytest.fixture
def three(make_run):
    return [
        make_run("ce", title="CE", recall=0.3, alpha=False),
        make_run("bbn", recall=0.6),
        make_run("afg", title="BBN + AFG", recall=0.9, stage=2, epochs=2, **{"from": "bbn"}),
    ]


def test_the_page_tells_the_story(three):
    page = Page(render(read_runs(three)))
    assert "CE, BBN, BBN + AFG on digits" in page.text
    assert re.search(r"BBN \+ AFG recognises [\d.]+ % of the test images, [\d.]+ points more than CE\.", page.text)
    assert re.search(r"the tail \(few\) gained [\d.]+ points", page.text)
    for words in (
        "Stage one",
        "Stage two",
        "from bbn",
        "selected on val",
        "Mixing weight α",
        "Tail accuracy (val, few)",
    ):
        assert words in page.text
    for words in ("accelerate launch train/bbn.py", "0123abc", "CPU, 2 cores", "optim: epochs: 3"):
        assert words in page.text
    assert "Mean over runs" not in page.text
    assert page.tags.count("strong") >= 6  # the best of each column


def test_the_headline_counts_right(three):
    runs = read_runs(three)
    first, last = runs[0].last, runs[-1].last
    text = Page(render(runs)).text
    assert f"{100 * last['top1']:.1f} % of the test images, {100 * (last['top1'] - first['top1']):.1f} points" in text
    assert f"the tail (few) gained {100 * (last['few'] - first['few']):.1f} points" in text


def test_a_worse_method_is_told_as_it_is(make_run):
    text = Page(render(read_runs([make_run("a", recall=0.9), make_run("b", title="Worse", recall=0.2)]))).text
    assert re.search(r"Worse recognises [\d.]+ % of the test images, [\d.]+ points less than BBN", text)
    assert "the tail (few) lost" in text


def test_an_equal_method_is_told_as_it_is(make_run):
    text = Page(render(read_runs([make_run("a"), make_run("b", title="Same")]))).text
    assert "level with BBN" in text
    assert "the tail (few) stayed level" in text


def test_the_page_needs_nothing_else(three):
    text = render(read_runs(three))
    page = Page(text)
    assert {"script", "link", "img", "iframe"}.isdisjoint(page.tags)
    assert all(value.startswith("#") for name, value in page.attributes if name in ("src", "href", "xlink:href"))
    assert "@import" not in text
    assert "url(http" not in text


def test_the_page_is_the_same_every_time(three):
    assert render(read_runs(three)) == render(read_runs(three))


def test_one_run_one_epoch_one_class(make_run):
    text = Page(render(read_runs([make_run("one", epochs=1, alpha=False, train_counts=[7])]))).text
    assert "BBN recognises" in text
    assert "% of the tail (few)." in text
    assert "against" not in text
    assert "no class" in text  # many and medium
    assert "Mixing weight" not in text
    assert "Best in bold" not in text


def test_a_run_that_never_measured_its_speed(make_run):
    assert "912 images/s" in Page(render(read_runs([make_run("bbn")]))).text
    assert "images/s" not in Page(render(read_runs([make_run("afg", images_per_second=None)]))).text


def test_names_are_escaped(make_run):
    nasty = "<script>alert('猫')</script>"
    run = make_run("x", title=nasty, dataset=nasty, classes=[nasty], train_counts=[7], command=nasty)
    (run / "config.yaml").write_text(nasty, encoding="utf-8")
    text = render(read_runs([run]))
    assert "<script" not in text
    assert Page(text).text.count(nasty) >= 5


def test_losses_that_are_not_finite_leave_a_gap_and_a_note(make_run):
    run = make_run("bbn")
    rows = [{"epoch": i, "loss": loss} for i, loss in enumerate((1.0, float("nan"), float("inf"), 2.0), start=1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    text = Page(render(read_runs([run]))).text
    assert "BBN: the loss was not finite in 2 of 4 epochs." in text
    assert "Training loss" in text
    assert "Learning rate" not in text
    assert "Overall accuracy" not in text


def test_a_run_without_any_logged_epoch(make_run):
    run = make_run("bbn")
    (run / "metrics.jsonl").write_text("", encoding="utf-8")
    assert "Training loss" not in Page(render(read_runs([run]))).text


def test_no_test_images(make_run):
    text = Page(render(read_runs([make_run("a", test_images_per_class=0)]))).text
    assert "No test images were evaluated." in text


def test_the_best_is_bold_and_a_low_calibration_error_is_best(make_run):
    figures_of = dict.fromkeys(("top1", "many", "medium", "few", "balanced_accuracy"), 0.5)
    runs = [make_run(n, title=n, last=figures_of | {"top1": t, "ece": t / 10}) for n, t in (("a", 0.4), ("b", 0.9))]
    bold = re.findall("<strong>(.*?)</strong>", render(read_runs(runs)))
    assert bold == ["50.0"] * 4 + ["4.0", "90.0"] + ["50.0"] * 4


def test_a_section_for_each_dataset(make_run):
    runs = read_runs([make_run("a"), make_run("b", dataset="zebra", train_counts=[30, 7]), make_run("c", title="CE")])
    page = Page(render(runs))
    assert page.tags.count("section") == 2
    assert "BBN, CE on digits" in page.text
    assert "BBN on zebra" in page.text


def test_seeds_get_labels_and_a_mean(make_run):
    runs = read_runs([make_run("a", seed=1), make_run("b", seed=2), make_run("c", seed=2), make_run("d", title="CE")])
    text = Page(render(runs)).text
    for label in ("BBN · seed 1 ", "BBN · seed 2 · b ", "BBN · seed 2 · c ", "CE "):
        assert label in text
    assert "Mean over runs" in text
    assert "than BBN (mean of 3 runs)" in text or "level with BBN (mean of 3 runs)" in text


def test_runs_that_cannot_share_a_page(make_run):
    many = [make_run(f"{i}", seed=i) for i in range(figures.MAX_RUNS + 1)]
    with pytest.raises(UserError, match=f"9 runs on digits are too many .* at most {figures.MAX_RUNS}, or tabulate"):
        render(read_runs(many))
    render(read_runs(many[:-1]))
    other = make_run("other", classes=list("abcdef"))
    with pytest.raises(UserError, match=r"other and .* both say digits but differ in their classes"):
        render(read_runs([many[0], other]))


def test_different_class_counts_are_noted(make_run):
    runs = read_runs([make_run("a"), make_run("b", title="CE", train_counts=[50, 40, 30, 20, 10, 5])])
    assert "trained on different class counts" in Page(render(runs)).text


def test_eight_thousand_classes_make_a_small_page(make_run):
    counts = np.maximum(2, 1000 * np.arange(1, 8143) ** -0.55).astype(int).tolist()
    runs = read_runs([make_run(name, title=name, train_counts=counts) for name in ("CE", "BBN")])
    text = render(runs)
    assert len(text) < 250_000
    assert "8,142" in text
    assert "Every class" not in text


def test_where_the_page_goes(three, make_run, tmp_path, monkeypatch):
    runs = read_runs(three)
    assert write_report(runs[:1]) == three[0] / "report.html"
    assert write_report(runs) == tmp_path / "runs" / "report.html"
    elsewhere = read_runs([three[0], make_run("deeper/still")])
    assert write_report(elsewhere) == tmp_path / "runs" / "report.html"
    monkeypatch.chdir(three[1])
    assert write_report(read_runs([Path()])) == three[1] / "report.html"
    out = tmp_path / "page.html"
    out.write_text("old", encoding="utf-8")
    assert write_report(runs, out) == out
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize("out", ["no/such/folder.html", "runs"])
def test_a_page_that_cannot_be_written_leaves_nothing(three, tmp_path, out):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=f"{out} cannot be written .*; name a file with --out"):
        write_report(read_runs(three), tmp_path / out)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("counts", [[7], [0, 0], [500, 0], [100] * 50, [10**6, 1], list(range(1, 301))])
def test_every_shape_of_tail_can_be_drawn(counts):
    counts_C = np.array(counts)
    total_C = np.full(len(counts), 4)
    for svg in (
        figures.class_count_curve(counts_C),
        figures.accuracy_by_class_size([(counts_C, total_C // 2, total_C), (counts_C, total_C, total_C * 0)]),
    ):
        assert ET.fromstring(svg).tag.endswith("svg")
        assert not re.search("#[0-9a-f]{6}", svg)  # all colours follow the page


def test_the_count_curve_shades_only_groups_that_exist():
    svg = figures.class_count_curve([500, 50])
    assert "--many" in svg
    assert "--medium" in svg
    assert "--few" not in svg


def test_a_curve_without_values_is_not_drawn():
    assert figures.curve([([], []), ([1, 2], [np.nan, np.inf])], "nothing") is None


def test_palette_colours_are_told_apart_by_value():
    assert len({light for light, _ in figures.PALETTE.values()}) == len(figures.PALETTE)
