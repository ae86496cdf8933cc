"""`python -m analysis`, as people type it."""

import json
import subprocess
import sys

import pytest

from analysis.__main__ import main


def test_compare_prints_a_table(make_run, capsys):
    main(["compare", str(make_run("ce", title="CE")), str(make_run("bbn"))])
    captured = capsys.readouterr()
    assert [line.split()[0] for line in captured.out.splitlines() if line] == ["digits:", "overall", "CE", "BBN"]
    assert captured.err == ""


def test_compare_prints_json(make_run, capsys):
    main(["compare", "--json", str(make_run("bbn", train_counts=[30, 7]))])
    (row,) = json.loads(capsys.readouterr().out)
    assert row["baselines"] == {}
    assert (row["dataset"], row["title"], row["seeds"]) == ("digits", "BBN", [0])
    assert row["mean"]["many"] is None
    assert 0 < row["mean"]["few"] <= 1


def test_compare_warns_of_different_class_counts(make_run, capsys):
    main(["compare", str(make_run("a")), str(make_run("b", train_counts=[9, 8, 7, 6, 5, 4]))])
    assert capsys.readouterr().err == "note: the runs on digits were trained on different class counts\n"


def test_report_prints_where_it_lies(make_run, capsys, tmp_path):
    run = make_run("bbn")
    main(["report", str(run)])
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    main(["report", str(run), "--out", str(tmp_path / "x.html")])
    assert (tmp_path / "x.html").read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize("argv", [[], ["compare"], ["report"], ["compare", "x", "--nonsense"], ["plot", "x"]])
def test_a_wrong_command_line_exits_2(argv):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2


@pytest.mark.parametrize("command", ["compare", "report"])
def test_a_path_that_is_no_run_exits_2_in_one_line(command, tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "analysis", command, str(tmp_path / "nowhere")], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stdout == ""
    expected = f"python -m analysis: error: {tmp_path / 'nowhere'} is not a folder; name the folder of a run"
    assert result.stderr.splitlines() == [expected]


def test_analysis_never_loads_torch():
    code = "import sys, analysis.__main__, analysis.metrics, analysis.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
