"""Tables: grouping, spread and their look."""

import dataclasses
import statistics

import pytest

from analysis.compare import Spread, group_runs, mismatches, repeated_runs
from analysis.metrics import percent
from analysis.runs import read_runs
from analysis.tables import blocks, table


@pytest.fixture
def runs(make_run):
    paths = [make_run(f"ce-{seed}", title="CE", recall=0.4, seed=seed) for seed in range(3)]
    paths += [make_run("bbn", recall=0.8), make_run("other", dataset="zebra", title="CE", train_counts=[30, 7])]
    return read_runs(paths)


def test_runs_of_a_method_are_averaged_over_seeds(runs):
    ce, bbn, zebra = group_runs(runs)
    assert [(entry.dataset, entry.title) for entry in (ce, bbn, zebra)] == [
        ("digits", "CE"),
        ("digits", "BBN"),
        ("zebra", "CE"),
    ]
    few = [run.last["few"] for run in runs[:3]]
    assert len(set(few)) > 1
    assert ce.seeds == [0, 1, 2]
    assert ce.last.mean["few"] == pytest.approx(sum(few) / 3)
    assert ce.last.std["few"] == pytest.approx(statistics.stdev(few))
    assert set(bbn.last.std.values()) == {None}


def test_a_second_stage_that_is_named_first_is_no_baseline(make_run):
    named = [make_run("afg", title="BBN + AFG", stage=2, **{"from": "bbn"}), make_run("bbn", title="BBN"),
             make_run("ce", title="CE")]  # fmt: skip
    assert [entry.title for entry in group_runs(read_runs(named))] == ["BBN", "CE", "BBN + AFG"]
    assert [entry.title for entry in group_runs(read_runs(named[:1]))] == ["BBN + AFG"]


def test_selected_figures_are_averaged_over_the_runs_that_selected(make_run):
    figures = dict.fromkeys(("top1", "many", "medium", "few", "balanced_accuracy", "ece"), 0.5)
    paths = [
        make_run(f"{i}", seed=i, selected={**figures, "few": few, "epoch": i})
        for i, few in enumerate((0.2, 0.4), start=1)
    ]
    (entry,) = group_runs(read_runs([*paths, make_run("3", selected=None, selected_on=None)]))
    assert entry.selected.mean["few"] == pytest.approx(0.3)
    assert entry.selected.std["few"] == pytest.approx(0.02**0.5)
    (entry,) = group_runs(read_runs([make_run("4", selected=None, selected_on=None)]))
    assert entry.selected is None


def test_a_group_without_classes_is_null(runs):
    zebra = group_runs(runs)[-1]
    assert zebra.last.mean["many"] is None
    assert zebra.last.mean["few"] is not None


def test_no_runs_make_no_table():
    assert table(blocks(group_runs([]))) == ""


def spread_of(mean, std):
    keys = ("top1", "many", "medium", "few", "balanced_accuracy", "ece")
    return Spread(dict(zip(keys, mean, strict=True)), dict(zip(keys, std, strict=True)))


def test_the_table_to_the_letter(runs):
    two = spread_of((0.842, 1, None, 0.61, 0.842, 0.061), (0.005, 0.102, None, 0.012, 0.005, 0.003))
    one = spread_of((0.86, 0.981, None, 0.704, 0.86, 0.05), (None,) * 6)
    ce = group_runs(runs)[0]
    rows = [
        dataclasses.replace(ce, replicates={0: runs[:1], 1: runs[1:2]}, last=two),
        dataclasses.replace(ce, title="BBN + AFG", replicates={0: runs[:1]}, last=one),
    ]
    assert table(blocks(rows)) == (
        "digits: %, last epoch; ± standard deviation over n seeds\n"
        "\n"
        "            overall        many  medium       few  balanced      ECE  n\n"
        "CE         84.2±0.5  100.0±10.2       –  61.0±1.2  84.2±0.5  6.1±0.3  2\n"
        "BBN + AFG  86.0       98.1            –  70.4      86.0      5.0      1"
    )


def test_the_table_fits_a_terminal(runs):
    assert all(len(line) <= 80 for line in table(blocks(group_runs(runs))).splitlines())


def test_runs_on_different_data_are_named(runs, make_run):
    assert mismatches(runs) == []
    thinner = make_run("thin", train_counts=[50, 40, 30, 20, 10, 5])
    renamed = make_run("renamed", classes=list("abcdef"))
    held_out = make_run("held-out", evaluated_on="val")
    fewer = make_run("fewer", test_images_per_class=19)
    for path, said in (
        (thinner, "were trained on different class counts"),
        (renamed, "have different classes, or the same ones in another order"),
        (held_out, "were evaluated on test and val"),
        (fewer, "were evaluated on different numbers of images"),
    ):
        assert mismatches([*runs, *read_runs([path])]) == [f"the runs on digits {said}"]


def test_figures_of_different_splits_or_classes_are_never_averaged(make_run):
    changes = [{}, {"evaluated_on": "val"}, {"classes": list("abcdef")}]
    entries = group_runs(read_runs([make_run(f"{seed}", seed=seed, **change) for seed, change in enumerate(changes)]))
    assert [entry.title for entry in entries] == ["BBN, on test", "BBN, on val", "BBN, on test (2)"]


@pytest.mark.parametrize(("value", "text"), [(None, "–"), (0, "0.0"), (1, "100.0"), (0.8425, "84.2")])
def test_percent(value, text):
    assert percent(value) == text


def test_baselines_stand_under_the_entry_that_measured_them(make_run):
    figures = {"top1": 0.5, "many": 0.75, "medium": 0.5, "few": None, "balanced_accuracy": 0.5, "ece": 0.125}

    def against(top1: float) -> dict:
        rows = [{"name": name, "setting": {}, **figures, "top1": top1} for name in ("cRT", "LWS")]
        return {"selected_on": "val", "rows": rows}

    runs = [make_run(f"{seed}", title="AFG", seed=seed, baselines=against(0.25 + seed / 2)) for seed in range(2)]
    entries = group_runs(read_runs([*runs, make_run("bbn")]))
    plain, whole = table(blocks(entries)).splitlines(), table(blocks(entries, baselines=True)).splitlines()
    assert [line.split("  ")[0] for line in plain[3:]] == ["AFG", "BBN"]
    assert [line[:6].rstrip() for line in whole[3:]] == ["AFG", "  cRT", "  LWS", "BBN"]
    assert whole[4].split() == ["cRT", "50.0±35.4", "75.0±0.0", "50.0±0.0", "–", "50.0±0.0", "12.5±0.0", "2"]


def test_runs_on_other_images_are_named(make_run):
    runs = read_runs([make_run(name, settings={"about.fingerprint": name}) for name in ("a", "b")])
    named = ["the runs on digits were trained on different images, or on the same in other shards"]
    assert mismatches(runs) == named
    assert repeated_runs(group_runs(runs)) == []
    # Second stages have the images of their stage one.
    seconds = [make_run(f"afg-{run.name}", title="AFG", stage=2, **{"from": run.name}) for run in runs]
    assert mismatches(read_runs(seconds)) == named
