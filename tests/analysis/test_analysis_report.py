"""The report: whole, self-contained, escaped, small, and right in degenerate cases."""

import html.parser
import itertools
import json
import os
import re
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextToPath

from analysis import figures, page
from analysis.compare import group_runs
from analysis.comparison import comparison
from analysis.drawing import canvas, inline_svg, styled
from analysis.gallery import _series
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
    assert "3 methods on digits, compared with CE" in page.text
    assert re.search(
        r"BBN \+ AFG does best of 3 methods: counting every class equally, it recognises [\d.]+ % of the test images,"
        r" [\d.]+ points more than CE with [\d.]+ %\.",
        page.text,
    )
    assert "CE and BBN + AFG have a single seed, and another may turn out differently: train two more" in page.text
    assert re.search(r"It gains [\d.]+ points in the tail \(few\)", page.text)
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
    assert "±" not in page.text
    assert page.tags.count("strong") >= 6  # the best of each column


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
    assert "% of the tail (few). This is a single seed." in text
    assert "against" not in text
    assert "no images" in text  # many and medium
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
    assert "CE compared with BBN on digits" in page.text
    assert "BBN on zebra" in page.text


FIGURES = dict.fromkeys(("top1", "many", "medium", "few", "balanced_accuracy", "ece"), 0.5)


@pytest.fixture
def make_seeds(make_run):
    """Make one run of a title for each overall accuracy."""

    def make(title, top1s, **changes):
        return [
            make_run(
                f"{title}-{seed}",
                title=title,
                seed=seed,
                last=FIGURES | {"top1": top1, "balanced_accuracy": top1},
                **changes,
            )
            for seed, top1 in enumerate(top1s)
        ]

    return make


def rows_of(page):
    """The first table's rows: their words, a space between."""
    body = page[page.index("<table") : page.index("</table>")]
    return [" ".join(re.sub("<.*?>", " ", row).split()) for row in re.findall("<tr.*?</tr>", body, flags=re.S)]


def test_seeds_of_a_title_are_one_entry(make_seeds):
    paths = make_seeds("CE", (0.5, 0.6)) + make_seeds("BBN", (0.7, 0.8, 0.9), selected={**FIGURES, "epoch": 2})
    page = render(read_runs([*paths[2:], *paths[:2]][::-1]))  # the titles' order is that of their first runs
    _, ce, _, bbn, selected = rows_of(page)
    assert ce.startswith("CE 2 seeds 55.0 ±7.1 50.0 ±0.0 ")
    assert bbn.startswith("BBN 3 seeds 80.0 ±10.0 +25.0 50.0 ±0.0 0.0 ")
    assert selected.startswith("selected on val 50.0 ±0.0 ")
    assert "<strong>80.0</strong>" in page
    text = Page(page).text
    assert "BBN compared with CE on digits" in text
    assert (
        "BBN (mean of 3 seeds) does better than CE (mean of 2 seeds): counting every class equally, it recognises 80.0"
        " % of the test images, 25.0 points more than CE with 55.0 %." in text
    )
    assert "within the spread" not in text
    assert "--entry1" in page
    assert text[text.index("Runs CE") :].count("seed 2 BBN-2, 75 s") == 1
    assert page.count("<pre>") == 5


def test_a_single_run_beside_seeds_has_no_spread(make_seeds):
    _, ce, _, bbn, _ = rows_of(render(read_runs(make_seeds("CE", (0.5,)) + make_seeds("BBN", (0.7, 0.9)))))
    assert ce.startswith("CE 50.0 50.0 ")
    assert bbn.startswith("BBN 2 seeds 80.0 ±14.1 +30.0 ")


def test_a_seed_run_twice_is_reported_as_runs(make_run):
    text = Page(render(read_runs([make_run("a", seed=2), make_run("b", seed=2)]))).text
    assert "BBN (mean of 2 runs of one seed) recognises" in text
    assert "BBN on digits: seed 2 was run twice (a, b); their mean counts as one seed." in text
    assert "±" not in text


@pytest.mark.parametrize(
    ("first", "last", "reported"),
    [
        ((0.50, 0.60), (0.55, 0.65), True),  # 5 points, ±7.1 both
        ((0.50,), (0.50, 0.60), True),
        ((0.50, 0.60), (0.58,), True),
        ((0.50, 0.51), (0.55, 0.56), False),
        ((0.50,), (0.55,), False),
        ((0.40, 0.60), (0.40, 0.60), False),  # level: no difference to doubt
    ],
)
def test_a_difference_within_the_spread_is_reported(make_seeds, first, last, reported):
    text = Page(render(read_runs(make_seeds("CE", first) + make_seeds("BBN", last)))).text
    assert ("The difference overall is within the spread of the seeds." in text) == reported


def test_differences_within_the_spread_are_listed(make_run):
    paths = [
        make_run(
            f"{title}{seed}",
            title=title,
            seed=seed,
            last=FIGURES | dict.fromkeys(("top1", "balanced_accuracy", "many", "few"), mean + d),
        )
        for title, mean in (("CE", 0.5), ("BBN", 0.51))
        for seed, d in enumerate((-0.1, 0.1))
    ]
    text = Page(render(read_runs(paths))).text
    assert "The difference overall, in the head and in the tail is within the spread of the seeds." in text


def test_curves_show_the_epochs_that_all_seeds_logged(make_run):
    runs = read_runs([make_run("a", epochs=3), make_run("b", seed=1, epochs=5)])
    epochs, values_NE = _series([run.epochs for run in runs[:2]], "loss")
    assert epochs == [1, 2, 3]
    assert np.shape(values_NE) == (2, 3)


def test_losses_of_a_seed_that_are_not_finite_name_its_run(make_run):
    paths = [make_run("a"), make_run("b", seed=1)]
    (paths[1] / "metrics.jsonl").write_text('{"epoch": 1, "loss": NaN}\n', encoding="utf-8")
    assert "BBN (b): the loss was not finite in 1 of 1 epochs." in Page(render(read_runs(paths))).text


def test_a_classs_accuracy_is_that_over_all_seeds(make_run):
    paths = [make_run("a", train_counts=[30, 7]), make_run("b", seed=1, train_counts=[30, 7])]
    for path, correct in zip(paths, ([4, 0], [2, 0]), strict=True):
        rows = json.loads((path / "per_class.json").read_text(encoding="utf-8"))
        rows |= {"correct": correct, "total": [4, 0]}
        (path / "per_class.json").write_text(json.dumps(rows), encoding="utf-8")
    assert "class 0 30 75.0 class 1 7 –" in Page(render(read_runs(paths))).text


def test_runs_that_cannot_share_a_page(make_run):
    other = make_run("other", classes=list("abcdef"))
    with pytest.raises(UserError, match=r"other and .* both say digits but differ in their classes"):
        render(read_runs([make_run("one"), other]))


def test_more_methods_than_colours_are_a_table_that_sorts(make_run):
    many = [make_run(f"{i}", title=f"<{i}>") for i in range(page.MAX_ENTRIES + 1)]
    text = render(read_runs(many))
    assert 'class="sortable"' in text
    assert "does best of 9 methods" in text
    assert text.count("<pre>") == 9
    eight = render(read_runs([*many[:-1], make_run("more", title="<0>", seed=1)]))  # seeds do not count
    assert "Head, middle and tail" in eight


def test_different_class_counts_are_noted(make_run):
    runs = read_runs([make_run("a"), make_run("b", title="CE", train_counts=[50, 40, 30, 20, 10, 5])])
    text = Page(render(runs)).text
    assert "The runs on digits were trained on different class counts, so their figures are not directly comp" in text
    assert "The class counts shown are those of a." in text


def test_eight_thousand_classes_make_a_small_page(make_run):
    counts = np.maximum(2, 1000 * np.arange(1, 8143) ** -0.55).astype(int).tolist()
    common = {"train_counts": counts, "test_images_per_class": 3, "predictions": True, "diagnostics": True}
    runs = read_runs(
        [
            make_run("CE", title="CE", recall=0.2, **common),
            make_run("BBN", recall=0.5, **common),
            make_run("AFG", title="BBN + AFG", recall=0.6, stage=2, **common, **{"from": "BBN"}),
        ]
    )
    text = render(runs)
    assert len(text) < 3_000_000
    page = Page(text)
    assert "8,142" in page.text
    assert "Every class" in page.text
    assert page.tags.count("table") > 162  # those that are not on the screen need no layout
    assert page.tags.count("path") < 2000
    for heading in ("Confidence intervals", "Calibration", "Classifier and features", "Generated features"):
        assert heading in page.text


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
    for svg in (
        inline_svg(figures.class_count_curve(counts_C)),
        inline_svg(figures.accuracy_by_class_size([(counts_C, np.full(len(counts), v)) for v in (0.5, np.nan)])),
    ):
        assert ET.fromstring(svg).tag.endswith("svg")
        assert not re.search("#[0-9a-f]{6}", svg)  # all colours follow the page


def test_the_count_curve_shades_only_groups_that_exist():
    svg = inline_svg(figures.class_count_curve([500, 50]))
    assert "--many" in svg
    assert "--medium" in svg
    assert "--few" not in svg


def test_a_curve_without_values_is_not_drawn():
    assert figures.curve([([], [[]]), ([1, 2], [[np.nan, np.inf]]), ([1], [[0.5], [np.nan]])], "nothing") is None


@pytest.mark.parametrize(("values_NE", "bands"), [([[1, 2, 3]], 0), ([[1, 2, 3], [2, 3, 5]], 1)])
def test_a_curve_has_a_band_only_where_there_are_several_runs(values_NE, bands):
    svg = inline_svg(figures.curve([([1, 2, 3], values_NE)], "loss"))
    assert svg.count("fill-opacity: 0.2") == bands


def spread(value, std):
    return figures.Spread(dict.fromkeys(FIGURES, value), dict.fromkeys(FIGURES, std))


def test_only_spreads_have_error_bars():
    one, several = (figures.group_bars([spread(0.9, std)]) for std in (None, 0.05))
    marks = [inline_svg(figure).count("<use") for figure in (one, several)]
    assert marks[1] == marks[0] + 8  # two caps for each of four bars


@pytest.mark.parametrize("entries", [1, 2, 3, 4])
@pytest.mark.parametrize("value", [1.0, 0.99996, 0.888])
def test_labels_of_bars_never_touch(entries, value):
    svg = ET.fromstring(inline_svg(figures.group_bars([spread(value, None)] * entries)))
    labels = []
    for group in svg.iter("{http://www.w3.org/2000/svg}g"):
        if group.get("class") == "value":
            (text,) = group
            size = float(re.search(r"font-size: ([\d.]+)px", text.get("style"))[1])
            width, _, _ = TextToPath().get_text_width_height_descent(text.text, FontProperties(size=size), False)
            labels.append((float(text.get("x")), width))
    assert len(labels) == 4 * entries
    labels.sort()
    gaps = [right - left - (w + v) / 2 for (left, w), (right, v) in itertools.pairwise(labels)]
    assert min(gaps) > 1.5  # points


def test_palette_colours_are_reported_apart_by_value():
    assert len({light for light, _ in page.PALETTE.values()}) == len(page.PALETTE)


def test_what_a_run_measured_itself_against_is_a_table(make_run):
    last = {"top1": 0.5, "many": 0.75, "medium": 0.5, "few": None, "balanced_accuracy": 0.5, "ece": 0.125}
    rows = [{"name": "cRT <1>", "setting": {"rate": 1.0}, **last}, {"name": "LWS", "setting": {}, **last, "top1": 0.25}]
    runs = [make_run(f"afg{i}", title="AFG", seed=i, baselines={"selected_on": "val", "rows": rows}) for i in range(2)]
    page = render(read_runs([make_run("bbn"), *runs]))
    assert page.count("against other classifiers") == 1
    assert "cRT &lt;1&gt;" in page
    table = page[page.index("against other classifiers") : page.index("Head, middle and tail")]
    assert table.count("<tr>") == 4
    assert "25.0" in table
    # The best of a column stands out: of ECE the lowest. All columns have one, and few's is the run's alone.
    assert table.count("<strong>") == 6
    assert "<strong>6.2</strong>" in table
    assert "<strong>25.0</strong>" not in table
    assert "±0.0" in table


@pytest.mark.parametrize(
    ("selected_on", "said"),
    [("val", "its own setting chosen on the held-out split."), (None, "the first setting of its grid: there was no")],
)
def test_it_says_whether_baselines_were_chosen(make_run, selected_on, said):
    row = {"name": "cRT", "setting": {}, **read_runs([make_run("ce")])[0].last}
    run = make_run("afg", title="AFG", baselines={"selected_on": selected_on, "rows": [row]})
    assert said in " ".join(render(read_runs([run])).split())


def test_figures_over_other_seeds_are_not_subtracted(make_run):
    row = {"name": "cRT", "setting": {}, **FIGURES}
    runs = [
        make_run(f"{i}", title="AFG", seed=i, baselines={"selected_on": "val", "rows": rows})
        for i, rows in enumerate(([row], []))
    ]
    text = Page(render(read_runs(runs))).text
    assert "Best in bold; some were measured with fewer seeds." in text
    assert "against the first row" not in text
    assert "against the first row" in Page(render(read_runs(runs[:1]))).text


def test_the_page_says_which_weights_a_second_stage_began_with(make_run):
    make_run("bbn")
    runs = [make_run(f"{w}", title=w, stage=2, from_weights=w, **{"from": "bbn"}) for w in ("last", "selected")]
    assert "from bbn, selected weights" in Page(render(read_runs(runs[1:]))).text
    assert "selected weights" not in Page(render(read_runs(runs[:1]))).text


def test_both_pages_say_which_settings_are_unknown(make_run):
    runs = read_runs([make_run("afg", title="BBN + AFG", stage=2, **{"from": "gone"})])
    for text in (render(runs), comparison(group_runs(runs), {})):
        assert "afg was trained on gone, whose config.yaml cannot be read: the settings of stage one are not" in text


def test_what_is_not_known_of_the_environment_is_a_dash(make_run):
    text = Page(render(read_runs([make_run("a", environment={"torch": "2.15.0", "commit": None})]))).text
    assert "torch 2.15.0 commit –" in text


@pytest.mark.parametrize("baselines", [[], {"rows": {}}, {"rows": [{"name": "cRT"}]}, {"rows": [3]}])
def test_damaged_baselines_are_named(make_run, baselines):
    with pytest.raises(UserError, match="'baselines' must hold named rows of figures"):
        read_runs([make_run("afg", baselines=baselines)])


@pytest.fixture
def predicted(make_run):
    """Three entries, each with predictions."""
    titles = {"CE": 0.2, "BBN": 0.9, "BBN + AFG": 0.7}
    return [make_run(title, title=title, recall=recall, predictions=True) for title, recall in titles.items()]


def test_predictions_make_sections_of_their_own(predicted, make_run):
    page = Page(render(read_runs(predicted)))
    for heading in ("Confidence intervals", "Confusion", "Calibration"):
        assert heading in page.text
    own, gain = r"\d+\.\d \[\d+\.\d, \d+\.\d\] ", r"\+\d+\.\d \[[−\d.]+, [\d.]+\] "
    assert re.search(f"CE {own}{own}BBN {own}{own}{gain}{gain}", page.text)
    assert "% interval)." in page.text  # in the headline
    (heat,) = re.findall(r'class="heat".*?</table>', render(read_runs(predicted)), flags=re.S)[1:]
    assert heat.count("<tr>") == 7
    without = Page(render(read_runs([make_run("x"), make_run("y", title="CE")]))).text
    for heading in ("Confidence intervals", "Confusion", "Calibration"):
        assert heading not in without


def test_one_run_has_intervals_of_its_own(predicted):
    text = Page(render(read_runs(predicted[1:2]))).text
    assert re.search(r"Percent of the test images, and the 95 % interval .* BBN \d+\.\d \[\d+\.\d, \d+\.\d\]", text)
    assert text.count("Confusion") == 1


def test_predictions_of_one_entry_alone_draw_no_picture_of_all(predicted, make_run):
    runs = read_runs([make_run("first", title="First"), *predicted[:1]])
    text = Page(render(runs)).text
    assert (
        "gain" not in text[text.index("Confidence intervals") : text.index("Head, middle")]
    )  # nothing to compare with
    assert "Calibration" not in text


def test_many_classes_have_pairs_instead_of_a_heat_map(make_run):
    counts = [300, *[2] * 49]
    nasty = [f"<b>{j}</b>" for j in range(50)]
    runs = [
        make_run(title, title=title, recall=0.2, train_counts=counts, classes=nasty, predictions=True) for title in "ab"
    ]
    page = render(read_runs(runs))
    assert 'class="heat"' not in page
    table = page[page.index("images of</th>") :]
    table = table[: table.index("</table>")]
    assert table.count("<tr>") == 12
    assert "&lt;b&gt;" in table
    assert "<b>" not in page


def test_a_test_split_without_images_but_with_predictions(make_run):
    runs = read_runs([make_run("a", test_images_per_class=0, predictions=True)])
    text = Page(render(runs)).text
    assert "No test images were evaluated." in text
    assert "Calibration" not in text


@pytest.mark.parametrize("out", [".", "/", "notes.txt/report.html", "a" * 250 + ".html", "a" * 300])
def test_no_place_for_a_page_is_a_users_mistake(three, tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("")
    with pytest.raises(UserError, match="name a file with --out"):
        write_report(read_runs(three[:1]), Path(out))


def test_a_link_stays_a_link_and_a_device_a_device(three, tmp_path):
    (tmp_path / "there.html").write_text("old")
    (tmp_path / "link.html").symlink_to("there.html")
    write_report(read_runs(three[:1]), tmp_path / "link.html")
    assert (tmp_path / "link.html").is_symlink()
    assert (tmp_path / "there.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    (tmp_path / "loop.html").symlink_to("loop.html")
    assert write_report(read_runs(three[:1]), tmp_path / "loop.html").is_file()
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor() as pool:
        read = pool.submit((tmp_path / "pipe").read_bytes)
        write_report(read_runs(three[:1]), tmp_path / "pipe")
        assert read.result().startswith(b"<!doctype html>")
    assert (tmp_path / "pipe").is_fifo()


def test_a_folder_whose_name_is_no_text(make_run):
    run = make_run(os.fsdecode(b"V\xf6gel"))
    assert "V\\udcf6gel" in write_report(read_runs([run])).read_text(encoding="utf-8")


def test_a_selected_classifier_is_named(make_run):
    selected = {**FIGURES, "epoch": 10, "name": "cRT"}
    run = make_run("afg", title="CE + AFG", stage=2, selected=selected, **{"from": "ce"})
    assert "selected on val: cRT" in Page(render(read_runs([run]))).text


def test_a_users_own_style_changes_nothing(monkeypatch):
    def drawn() -> str:
        with styled():
            figure, ax = canvas(3, 2, "a line")
            ax.plot([0, 1], [0, 1])
        return inline_svg(figure)

    plain = drawn()
    for key, value in {"savefig.bbox": "tight", "lines.marker": "o"}.items():
        monkeypatch.setitem(matplotlib.rcParams, key, value)
    assert drawn() == plain
