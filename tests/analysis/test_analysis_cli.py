"""`python -m analysis`, as people type it."""

import json
import shlex
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


@pytest.mark.parametrize("command", ["compare", "report"])
def test_what_a_glob_finds_beside_finished_runs_is_skipped_with_a_note(make_run, tmp_path, capsys, command):
    run, unfinished = make_run("bbn"), make_run("unfinished")
    (unfinished / "summary.json").unlink()
    (run.parent / "notes.txt").write_text("")
    (run.parent / "empty").mkdir()
    main([command, *map(str, sorted(run.parent.iterdir()))])
    captured = capsys.readouterr()
    assert captured.err == (
        f"note: skipped, no run: {run.parent / 'empty'}, {run.parent / 'notes.txt'}\n"
        f"note: skipped, not finished: {unfinished}\n"
    )
    assert captured.out


def test_paths_of_which_none_is_a_finished_run(make_run, capsys):
    unfinished = [make_run("a"), make_run("b")]
    for path in unfinished:
        (path / "summary.json").unlink()
    for argv, said in (
        (unfinished[:1], "is not finished"),
        ([unfinished[0], unfinished[0]], "is not finished"),
        (unfinished, "none of the 2 paths is a finished run"),
        ([make_run("c"), unfinished[0].parent / "misspelt"], "misspelt is not a folder"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["compare", *map(str, argv)])
        assert caught.value.code == 2
        assert said in capsys.readouterr().err


def test_a_damaged_run_among_several_is_still_an_error(make_run, capsys):
    runs = [make_run("a"), make_run("b")]
    (runs[1] / "summary.json").write_text("{", encoding="utf-8")
    with pytest.raises(SystemExit) as caught:
        main(["compare", *map(str, runs)])
    assert caught.value.code == 2
    assert "summary.json is damaged" in capsys.readouterr().err


def test_a_seed_run_twice_is_noted(make_run, capsys):
    main(["compare", str(make_run("a")), str(make_run("b"))])
    captured = capsys.readouterr()
    assert captured.err == ("note: BBN on digits: seed 0 was run twice (a, b); their mean counts as one seed\n")
    assert "±" not in captured.out


def test_analysis_never_loads_torch():
    code = "import sys, analysis.__main__, analysis.metrics, analysis.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_reader_that_has_seen_enough(make_run):
    runs = [str(make_run(f"{i}", title=f"{'t' * 2000}{i}")) for i in range(60)]
    words = shlex.join([sys.executable, "-m", "analysis", "compare", "--format", "csv", *runs])
    found = subprocess.run(["bash", "-o", "pipefail", "-c", f"{words} | head -c 1"], capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (141, "")


def test_a_link_that_leads_nowhere_is_skipped(make_run, capsys):
    run = make_run("bbn")
    (run.parent / "latest").symlink_to("gone")
    main(["compare", *map(str, sorted(run.parent.iterdir()))])
    assert capsys.readouterr().err == f"note: skipped, no run: {run.parent / 'latest'}\n"
