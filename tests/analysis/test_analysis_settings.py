"""Which runs are seeds of one experiment, and what tables call the others."""

import json

import pytest

from analysis.compare import group_runs, repeated_runs
from analysis.runs import read_runs
from analysis.settings import NOT_THE_RESULT, YOUNGER, unknown_stage_ones
from train.engine.config import Model, Optim
from train.features.commands import Extraction


def titles(*paths):
    return [entry.title for entry in group_runs(read_runs(paths))]


def test_runs_whose_settings_differ_are_not_averaged(make_run):
    plain = [make_run(f"a{seed}", seed=seed) for seed in range(2)]
    linear = [make_run(f"b{seed}", seed=seed, settings={"method.adaptor": "linear_decay"}) for seed in range(3)]
    entries = group_runs(read_runs([*plain, *linear]))
    assert [entry.title for entry in entries] == ["BBN, adaptor=parabolic_decay", "BBN, adaptor=linear_decay"]
    assert [entry.seeds for entry in entries] == [[0, 1], [0, 1, 2]]


@pytest.mark.parametrize(
    ("settings", "reported"),
    [
        ({"model.backbone": "resnet50"}, "BBN, resnet50"),
        ({"model.weights": "/data/runs/of last week/birds"}, "BBN, weights=birds"),
        ({"method.q": 0.0}, "BBN, q=0"),
        ({"optim.ema": 0.999}, "BBN, ema=0.999"),
        ({"optim.milestones": [0.5, 0.75]}, "BBN, milestones=[0.5, 0.75]"),
        ({"input.batch_size": 1048576}, "BBN, batch_size=1048576"),
        ({"optim.lr": 3e-05}, "BBN, lr=3e-05"),
        ({"loop.compile": True}, None),
        ({"input.batch_size": 32, "optim.lr": 0.2}, "BBN, batch_size=32, lr=0.2"),
        ({"method.new_switch": True}, "BBN, new_switch=true"),  # a setting that no list knows
    ],
)
def test_a_title_names_the_settings_that_differ(make_run, settings, reported):
    found = titles(make_run("a"), make_run("b", seed=1, settings=settings))
    assert found == ["BBN"] if reported is None else found[1] == reported and len(found) == 2


def test_what_does_not_change_the_result_does_not_split_an_experiment(make_run):
    changes = {key: "other" for key in NOT_THE_RESULT if key.startswith(("input.", "loop.")) and key != "loop.seed"}
    assert len(changes) >= 10
    assert titles(make_run("a"), make_run("b", seed=1, settings=changes)) == ["BBN"]


def test_whole_numbers_and_fractions_of_one_value_are_one_setting(make_run):
    assert titles(make_run("a"), make_run("b", seed=1, settings={"method.q": -1})) == ["BBN"]


def test_equal_names_of_two_sections_are_reported_with_their_section(make_run):
    runs = [make_run(str(i), settings={"input.size": i % 2, "method.size": i // 2}) for i in range(3)]
    assert titles(*runs)[1] == "BBN, input.size=1, method.size=0"


def test_different_datasets_of_one_name_are_not_averaged(make_run):
    assert titles(make_run("a", train_counts=[100, 10]), make_run("b", seed=1, train_counts=[100, 2])) == [
        "BBN, imbalance factor 10",
        "BBN, imbalance factor 50",
    ]
    assert titles(make_run("c", train_counts=[100, 50, 10]), make_run("d", seed=1, train_counts=[100, 20, 10])) == [
        "BBN, 160 training images",
        "BBN, 130 training images",
    ]
    assert titles(make_run("e", train_counts=[100, 10]), make_run("f", seed=1, train_counts=[10, 100])) == [
        "BBN, class counts 1",
        "BBN, class counts 2",
    ]


def stage_two(make_run, name, origin, **changes):
    return make_run(name, title="BBN + AFG", stage=2, **{"from": origin}, **changes)


def test_stage_two_is_grouped_by_its_stage_one_too(make_run):
    for seed in range(2):
        make_run(f"bbn-{seed}", seed=seed)
        make_run(f"linear-{seed}", seed=seed, settings={"method.adaptor": "linear_decay"})
    runs = [stage_two(make_run, f"afg-{n}-{seed}", f"{n}-{seed}") for n in ("bbn", "linear") for seed in range(2)]
    entries = group_runs(read_runs(runs))
    assert [entry.title for entry in entries] == [
        "BBN + AFG, stage-one adaptor=parabolic_decay",
        "BBN + AFG, stage-one adaptor=linear_decay",
    ]
    # Their own seed is 0 throughout; it is stage one's that differ.
    assert [len(entry.replicates) for entry in entries] == [2, 2]
    assert repeated_runs(entries) == []
    own = [*runs, stage_two(make_run, "b", "bbn-0", settings={"method.beta": 0.6})]
    assert titles(*own)[-1] == "BBN + AFG, beta=0.6, stage-one adaptor=parabolic_decay"


def test_the_extraction_of_stage_two_is_no_setting_of_the_result(make_run):
    make_run("bbn")
    runs = [stage_two(make_run, str(seed), "bbn", seed=seed, settings={"input.batch_size": seed}) for seed in (1, 2)]
    assert titles(*runs) == ["BBN + AFG"]


def test_a_stage_one_that_is_gone_leaves_its_name(make_run):
    runs = [stage_two(make_run, f"afg-{seed}", f"gone-{seed}") for seed in range(2)]
    (entry,) = group_runs(read_runs(runs))
    assert (entry.title, len(entry.replicates)) == ("BBN + AFG", 2)
    make_run("gone-1", seed=1)
    assert unknown_stage_ones(read_runs(runs)) == [
        "afg-0 was trained on gone-0, whose config.yaml cannot be read: the settings of stage one are not compared"
    ]


def test_where_stage_one_is_looked_for(make_run, tmp_path):
    # A hostile name leads nowhere outside the folder beside the run.
    outside = make_run("../outside")
    run = stage_two(make_run, "afg", "../outside")
    assert outside.exists()
    other = stage_two(make_run, "afg2", "bbn", seed=1)
    make_run("bbn")
    assert len(titles(run, other)) == 2


def test_the_same_seed_twice_is_a_repeat_and_no_spread(make_run):
    runs = [make_run(name, seed=seed, recall=recall) for name, seed, recall in (("a", 4, 0.3), ("b", 4, 0.6))]
    (entry,) = group_runs(read_runs(runs))
    assert set(entry.last.std.values()) == {None}
    few = [run.last["few"] for run in entry.runs]
    assert entry.last.mean["few"] == pytest.approx(sum(few) / 2)
    assert repeated_runs([entry]) == ["BBN on digits: seed 4 was run twice (a, b); their mean counts as one seed"]
    # Beside another seed the two of one count once.
    (entry,) = group_runs(read_runs([*runs, make_run("c", seed=5, recall=0.9)]))
    few.append(entry.runs[-1].last["few"])
    assert entry.last.mean["few"] == pytest.approx(((few[0] + few[1]) / 2 + few[2]) / 2)
    assert len(entry.replicates) == 2


def test_with_the_presets_own_settings_known_only_others_are_named(make_run):
    changes = {"method.adaptor": "linear_decay", "optim.epochs": 9}
    runs = [
        make_run("ce", title="CE", settings={"optim.epochs": 9}, changed=["optim.epochs"]),
        make_run("a", settings={"optim.epochs": 9}, changed=["optim.epochs"]),
        make_run("b", settings=changes, changed=list(changes)),
    ]
    # What all of them share is no difference between them.
    assert titles(*runs) == ["CE", "BBN", "BBN, adaptor=linear_decay"]
    # Alone among other titles it is still not the preset's BBN.
    assert titles(runs[0], runs[2]) == ["CE", "BBN, adaptor=linear_decay"]
    assert titles(make_run("d", changed=[]), runs[2]) == ["BBN", "BBN, adaptor=linear_decay, epochs=9"]
    assert titles(make_run("e", changed=["loop.seed", "input.threads"], seed=3), runs[0]) == ["BBN", "CE, epochs=9"]


def test_two_presets_of_one_name_are_still_reported_apart(make_run):
    runs = [make_run(str(lr), settings={"optim.lr": lr}, changed=[]) for lr in (0.1, 0.2)]
    assert titles(*runs) == ["BBN, lr=0.1", "BBN, lr=0.2"]


def test_a_title_that_says_it_already_is_left_alone(make_run):
    runs = [make_run(str(q), title=f"CE, q={q}", settings={"method.q": q}, changed=["method.q"]) for q in (0, 1)]
    assert titles(*runs) == ["CE, q=0", "CE, q=1"]


def test_older_runs_that_lack_a_setting_are_reported_apart(make_run):
    found = titles(make_run("old"), make_run("new", seed=1, settings={"optim.clip_norm": None}))
    assert found == ["BBN", "BBN, clip_norm=none"]


def test_titles_are_unique_whatever_happens(make_run):
    long = "w" * 60
    runs = [make_run(str(i), settings={"model.weights": f"{long}{i}{long}"}) for i in range(2)]
    found = titles(*runs)
    assert len(set(found)) == 2
    assert max(map(len, found)) < 80


def test_a_configuration_that_is_no_mapping_counts_as_empty(make_run):
    runs = [make_run("a"), make_run("b", seed=1)]
    (runs[1] / "config.yaml").write_text("- 1\n", encoding="utf-8")
    assert len(titles(*runs)) == 2


def test_a_summary_and_configuration_of_stage_one_that_are_damaged(make_run):
    first = make_run("bbn")
    (first / "config.yaml").write_text("a: [", encoding="utf-8")
    (entry,) = group_runs(read_runs([stage_two(make_run, "afg", "bbn")]))
    assert entry.title == "BBN + AFG"
    assert json.loads((first / "summary.json").read_text())["seed"] == 0


@pytest.mark.parametrize(("stage", "sections"), [(1, {"model": Model, "optim": Optim}), (2, {"input": Extraction})])
def test_a_younger_setting_is_what_runs_did_before_it(stage, sections):
    for key, value in YOUNGER[stage].items():
        section, name = key.split(".")
        assert vars(sections[section]())[name] == value


def test_a_run_of_before_a_setting_and_one_that_leaves_it_alone_are_seeds(make_run):
    left_alone = {key: list(value) if isinstance(value, tuple) else value for key, value in YOUNGER[1].items()}
    assert titles(make_run("a"), make_run("b", seed=1, settings=left_alone)) == ["BBN"]
    assert titles(make_run("c"), make_run("d", seed=1, settings={"optim.optimizer": "adamw"})) == [
        "BBN, optimizer=sgd",
        "BBN, optimizer=adamw",
    ]


def test_second_stages_on_other_weights_of_stage_one_are_not_averaged(make_run):
    make_run("bbn")
    runs = [stage_two(make_run, name, "bbn", seed=i, from_weights=name) for i, name in enumerate(("last", "selected"))]
    assert titles(*runs) == ["BBN + AFG, from.weights=last", "BBN + AFG, from.weights=selected"]


def test_a_stage_one_that_is_gone_makes_no_long_title_of_the_others(make_run):
    make_run("bbn-0")
    runs = [stage_two(make_run, f"afg-{seed}", f"bbn-{seed}", seed=seed) for seed in range(2)]
    assert titles(*runs) == ["BBN + AFG", "BBN + AFG, stage one unknown"]


def test_a_second_stage_whose_settings_cannot_be_read_makes_no_long_title_of_the_others(make_run):
    make_run("bbn")
    runs = [stage_two(make_run, f"afg-{seed}", "bbn", seed=seed) for seed in range(2)]
    (runs[1] / "config.yaml").write_text("- 1\n", encoding="utf-8")
    assert titles(*runs) == ["BBN + AFG", "BBN + AFG (2)"]


@pytest.mark.parametrize(
    ("key", "ce", "bbn", "said"),
    [
        ("model.weights", "default", None, ["CE, weights=default", "BBN, weights=none"]),  # not within reach
        ("model.backbone", "resnet50", "resnet18", ["CE, resnet50", "BBN, resnet18"]),  # a GPU, and none
        ("optim.epochs", 90, 180, ["CE, epochs=90", "BBN, epochs=180"]),  # a variant
        ("optim.lr", 0.1, 0.2, ["CE", "BBN"]),  # a method's own recipe
    ],
)
def test_what_presets_chose_is_named_where_a_comparison_rests_on_it(make_run, key, ce, bbn, said):
    runs = [
        make_run("ce", title="CE", settings={key: ce}, changed=[]),
        make_run("bbn", settings={key: bbn}, changed=[]),
    ]
    assert titles(*runs) == said


def test_which_weights_of_stage_one_is_named_beside_other_titles(make_run):
    make_run("bbn")
    runs = [
        make_run(name, title=f"BBN + {name}", stage=2, from_weights=weights, changed=[], **{"from": "bbn"})
        for name, weights in (("AFG", "last"), ("cRT", "selected"))
    ]
    assert titles(*runs) == ["BBN + AFG, from.weights=last", "BBN + cRT, from.weights=selected"]


@pytest.mark.parametrize("named", ["whole", "part", "link"])
def test_a_stage_one_elsewhere_is_found_where_the_run_says(make_run, tmp_path, monkeypatch, named):
    monkeypatch.chdir(tmp_path)
    runs = []
    for i, adaptor in enumerate(("parabolic_decay", "linear_decay")):
        place = make_run(f"../elsewhere{i}/bbn", settings={"method.adaptor": adaptor}, seed=i).resolve()
        (tmp_path / f"best{i}").symlink_to(place)
        place = {"whole": place, "part": f"elsewhere{i}/bbn", "link": f"best{i}"}[named]
        runs.append(stage_two(make_run, f"afg-{i}", "bbn", settings={"about.from": str(place)}))
    if named == "whole":
        make_run("bbn", settings={"method.adaptor": "cosine_decay"})  # of that name, and not the one
    assert titles(*runs) == [
        "BBN + AFG, stage-one adaptor=parabolic_decay",
        "BBN + AFG, stage-one adaptor=linear_decay",
    ]
    assert unknown_stage_ones(read_runs(runs)) == []


def test_a_link_to_stage_one_that_leads_elsewhere_by_now(make_run, tmp_path):
    place = make_run("../elsewhere/other")
    (tmp_path / "best").symlink_to(place.resolve())
    run = stage_two(make_run, "afg", "bbn", settings={"about.from": str(tmp_path / "best")})
    assert len(unknown_stage_ones(read_runs([run]))) == 1


def test_a_seed_of_before_there_were_fingerprints_is_the_same_seed(make_run):
    runs = [make_run("old"), make_run("new", settings={"about.fingerprint": "a"})]
    (entry,) = group_runs(read_runs(runs))
    assert len(entry.replicates) == 1
    (entry,) = group_runs(read_runs([*runs, make_run("other", settings={"about.fingerprint": "b"})]))
    assert len(entry.replicates) == 3


def test_what_a_second_stage_was_given_is_named_beside_other_titles(make_run):
    make_run("bbn", changed=[])
    asked = {"settings": {"method.k": 5}, "changed": ["method.k"]}
    runs = [stage_two(make_run, "afg", "bbn", **asked), make_run("ce", title="CE", changed=[])]
    runs.append(make_run("crt", title="BBN + cRT", stage=2, changed=[], **{"from": "bbn"}))
    assert titles(*runs) == ["CE", "BBN + AFG, k=5", "BBN + cRT"]
