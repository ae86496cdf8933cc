"""`python -m shards …` and scripts/build_shards.sh as people type them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from shards.__main__ import main
from shards.build import build
from shards.index import open_dataset

REPOSITORY = Path(__file__).parents[2]
# Elsewhere the script would first make an environment.
set_up = pytest.mark.skipif(not (REPOSITORY / ".venv/bin/tailstream").exists(), reason="needs scripts/setup.sh")


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a command line in this process: command("verify", "x") -> (status, stdout, stderr)."""

    def run(*arguments: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["shards", *map(str, arguments)])
        terminate = signal.getsignal(signal.SIGTERM)
        status: object = 0
        capsys.readouterr()
        try:
            main()
        except SystemExit as error:
            status = error.code
        finally:
            signal.signal(signal.SIGTERM, terminate)
        return status, *capsys.readouterr()

    return run


def test_build_verify_inspect(tmp_path, image_folder, command, monkeypatch):
    image_folder(tmp_path / "source", {"cat": 30, "dog": 30})
    monkeypatch.chdir(tmp_path)
    status, out, err = command(
        "build", "folder", "--source", "source", "--profile", "step", "--imbalance-factor", "4", "--workers", "1"
    )
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        "folder: train 25, val 4, test 16; 2 classes",
        "training images per class: 20 to 5, imbalance factor 4; 0 many, 1 medium, 1 few",
        "built in data/folder; next: tailstream train bbn --data data/folder",
    ]
    assert command("verify", "data/folder") == (0, "data/folder: no problem found\n", "")
    status, out, _ = command("inspect", "data/folder")
    assert status == 0
    assert "image height 20 to 20, width 24 to 24 pixels" in out


def test_names_that_neither_utf_8_nor_the_terminal_can_write(tmp_path, image_folder):
    """A folder of bytes, a class in Chinese, and a terminal that knows ASCII alone: nothing ends in a traceback."""
    image_folder(tmp_path / "source", {"cat": 6, "猫": 6})
    out = os.fsdecode(os.fsencode(tmp_path) + b"/o\xff")
    for arguments in (["build", "folder", "--source", tmp_path / "source", "--out", out], ["inspect", out]):
        command = [sys.executable, "-m", "shards", *map(str, arguments)]
        ran = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, check=False)
        assert ran.returncode == 0, ran.stderr
    assert b"\\u732b  " in ran.stdout
    assert open_dataset(out).name == "o\\xff"


def test_a_reader_who_has_seen_enough_ends_a_listing_quietly(digits):
    command = [sys.executable, "-m", "shards", "inspect", str(digits)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141


def test_verify_exits_1_on_a_problem_and_2_on_no_dataset(tmp_path, image_folder, command):
    source = image_folder(tmp_path / "source", {"a": 2, "b": 2})
    root = build("folder", source=source, out=tmp_path / "out", workers=1)
    (root / "train-000000.idx").unlink()
    assert command("verify", root, "--no-decode") == (1, "train-000000.idx: missing\n", "")
    status, out, err = command("verify", source)
    assert (status, out) == (2, "")
    assert err.startswith(f"python -m shards: error: {source} has no dataset.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], 'expected "subcommand" to be one of {build,verify,inspect}, but it was not provided; see --help'),
        (["build"], "the following arguments are required: DATASET; see --help"),
        (["build", "digits", "--bogus", "1"], "unrecognized arguments: --bogus 1; see --help"),
        (
            ["build", "digits", "--factor", "9"],
            "unrecognized arguments: --factor 9; did you mean --imbalance-factor? (see --help)",
        ),
        (
            ["inspect", "x", "--duplicate"],
            "unrecognized arguments: --duplicate; did you mean --duplicates? (see --help)",
        ),
        (["build", "digits", "--workers", "many"], "--workers cannot be 'many' (give a whole number); see --help"),
        (["build", "digits", "--seed", "x"], "--seed cannot be 'x' (give a whole number); see --help"),
        (["build", "mnist"], None),
        (["inspect", "nowhere"], None),
    ],
)
def test_mistakes_are_reported_in_one_line_with_status_2(command, arguments, message):
    status, out, err = command(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("python -m shards: error: ")
    assert err.count("\n") == 1
    if message:
        assert err == f"python -m shards: error: {message}\n"


def test_help_names_the_options_as_they_are_typed(command):
    status, out, _ = command("build", "--help")
    assert status == 0
    for option in ("--imbalance-factor", "--shorter-side", "--overwrite", "--test-fraction"):
        assert option in out


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(("workers", "sent", "status"), [(2, signal.SIGINT, 130), (1, signal.SIGTERM, 143)])
def test_an_interrupt_leaves_no_process_and_says_how_to_go_on(tmp_path, workers, sent, status):
    for name in ("a", "b"):
        (tmp_path / "source" / name).mkdir(parents=True)
        # Storing one takes seconds.
        Image.new("RGB", (9000, 9000), "red").save(tmp_path / f"source/{name}/large.png", compress_level=1)
    build = [sys.executable, "-m", "shards", "build", "folder", "--source", "source", "--out", "new/out"]
    process = subprocess.Popen(
        [*build, "--workers", str(workers), "--shard-samples", "1", "--test-fraction", "0", "--val-fraction", "0"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # in the background it is ignored
    )
    until = time.monotonic() + 60
    try:
        while not list(tmp_path.glob("new/out/.build/lock")):
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
        os.killpg(process.pid, sent)  # as a terminal does
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert err.startswith("new/out is unfinished; the same command resumes it\n")
    assert process.returncode == status
    assert not list(tmp_path.glob("new/out/.build/*.tar"))
    while group_lives(process.pid):  # Python's own helper process takes a moment to leave
        assert time.monotonic() < until
        time.sleep(0.05)


@set_up
def test_the_script_takes_paths_from_where_it_is_called(tmp_path, image_folder):
    image_folder(tmp_path / "pets", {"a": 2, "b": 2})
    (tmp_path / "shards").mkdir()  # as people call what they keep
    script = REPOSITORY / "scripts" / "build_shards.sh"
    subprocess.run([script, "folder", "--source", "pets", "--out", "here/pets"], cwd=tmp_path, check=True)
    assert open_dataset(tmp_path / "here" / "pets").name == "pets"


@set_up
def test_the_script_finds_its_own_folder_where_cd_says_where_it_went():
    command = ["scripts/build_shards.sh", "--help"]
    ran = subprocess.run(command, cwd=REPOSITORY, env=os.environ | {"CDPATH": "."}, capture_output=True, check=False)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("name", ["", "dataset.json", "train.samples.npy"])
def test_a_dataset_that_may_not_be_read_is_one_line(tmp_path, image_folder, command, permissions, name):
    out = build("folder", source=image_folder(tmp_path / "source", {"a": 3, "b": 3}), out=tmp_path / "out", workers=1)
    (out / name).chmod(0)
    status, _, error = command("inspect", out)
    assert status == 2
    refused = out / (name or "dataset.json")
    assert error == f"python -m shards: error: {refused}: Permission denied; change its permissions, or name another\n"
    (out / name).chmod(0o700)
