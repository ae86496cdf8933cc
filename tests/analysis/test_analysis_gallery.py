"""Figures alone, as files for papers."""

import re
import xml.etree.ElementTree as ET
from typing import get_args

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from analysis.__main__ import FigureName, main
from analysis.compare import group_runs
from analysis.drawing import alone
from analysis.gallery import NAMES, groups, write_figure
from analysis.runs import read_runs
from shards.errors import UserError

NASTY = "<script>alert(1)</script> $x_2$ & 100 %"


@pytest.fixture
def two(make_run):
    kept = {"predictions": True, "diagnostics": True}
    return [
        make_run("ce", title="CE", recall=0.3, **kept),
        make_run("bbn", **kept),
        make_run("afg", title="BBN + AFG", stage=2, **{"from": "bbn"}, **kept),
    ]


def test_the_command_line_knows_every_figure():
    assert get_args(FigureName) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_is_an_svg_with_its_entries_named(two, tmp_path, name, capsys):
    out = tmp_path / "figure.svg"
    main(["figure", name, *map(str, two), "--out", str(out)])
    assert capsys.readouterr().out == f"{out}\n"
    text = out.read_text(encoding="utf-8")
    assert ET.fromstring(text).tag.endswith("svg")
    assert (">BBN<" in text) == (name not in ("class-counts", "confusion", "features"))
    assert (">class 5<" in text) == (name == "features")
    assert "var(--" not in text  # colours of its own


def test_a_pdf_is_the_same_every_time(two, tmp_path):
    for name in ("a.pdf", "b.pdf"):
        write_figure("groups", read_runs(two), tmp_path / name)
    content = (tmp_path / "a.pdf").read_bytes()
    assert content.startswith(b"%PDF")
    assert content == (tmp_path / "b.pdf").read_bytes()


def test_hostile_titles_are_text(make_run, tmp_path):
    runs = read_runs([make_run("a", title=NASTY), make_run("b", title="猫")])
    text = write_figure("groups", runs, tmp_path / "x.svg").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; $x_2$ &amp; 100 %" in text
    assert "猫" in text
    assert write_figure("groups", runs, tmp_path / "x.pdf").stat().st_size > 1000


@pytest.mark.parametrize(
    ("name", "out", "said"),
    [
        ("alpha", "x.svg", "nothing to draw for alpha"),
        ("reliability", "x.svg", "nothing to draw for reliability: all of them need a predictions.npz"),
        ("confusion", "x.svg", "nothing to draw for confusion: it needs predictions.npz, and at most 100 classes"),
        ("weight-norms", "x.svg", "nothing to draw for weight-norms: it needs a diagnostics.npz"),
        ("compactness", "x.svg", "nothing to draw for compactness: it needs a diagnostics.npz of a first stage"),
        ("beta", "x.svg", "only AFG with --method.beta adaptive has a β per class"),
        ("features", "x.svg", "nothing to draw for features: it needs a feature_sample.npz, which AFG writes"),
        ("groups", "x.png", "x.png is neither SVG nor PDF; name a file such as --out x.pdf"),
        ("groups", "no/such/x.svg", "x.svg cannot be written"),
    ],
)
def test_what_cannot_be_drawn(make_run, tmp_path, name, out, said):
    runs = read_runs([make_run("a", alpha=False)])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=re.escape(said)):
        write_figure(name, runs, tmp_path / out)
    assert sorted(tmp_path.rglob("*")) == before


def test_runs_that_cannot_share_a_figure(make_run, tmp_path):
    runs = read_runs([make_run("a"), make_run("b", dataset="zebra")])
    with pytest.raises(UserError, match="these runs are of 2 datasets; name those of one"):
        write_figure("groups", runs, tmp_path / "x.svg")
    many = read_runs([make_run(f"{i}", title=f"{i}") for i in range(9)])
    with pytest.raises(UserError, match="9 titles on digits are too many"):
        write_figure("groups", many, tmp_path / "x.svg")


def test_a_misspelt_figure_exits_2(two, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["figure", "confusoin", str(two[0]), "--out", "x.svg"])
    assert caught.value.code == 2
    assert "confusoin" in capsys.readouterr().err


def test_mistakes_name_what_one_types(make_run, tmp_path, capsys):
    run = str(make_run("a"))
    for words, message in (
        (["figure", "confusoin", run, "--out", "x.svg"], "NAME cannot be 'confusoin'"),
        (["figure", "confusoin", run, "--out", "x.svg"], "did you mean confusion?"),
        (["figure", "groups", run], "required: --out"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(words)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("longest", ["BBN + AFG, beta=0.6", "CE + AFG, " + "teacher stage one, " * 6 + "k=5", "x" * 90])
def test_a_legend_stays_inside_its_picture(make_run, longest):
    names = ["CE, q=progressive", "BBN, adaptor=linear_decay", longest, "manifold mixup, two samplers"]
    figure = groups(group_runs(read_runs([make_run(f"{i}", title=name) for i, name in enumerate(names)])))
    height = figure.bbox.height
    alone(figure, names, "svg")
    (legend,) = figure.legends
    renderer = FigureCanvasAgg(figure).get_renderer()
    extent = legend.get_window_extent(renderer)
    assert extent.width <= figure.bbox.width
    assert extent.height <= figure.bbox.height - height + 12
    assert "".join("".join(text.get_text().split()) for text in legend.get_texts()) == "".join("".join(names).split())
