"""A build that is killed is resumed by the same command, and ends as if nothing had been."""

import fcntl
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import shards.build
from shards.build import build
from shards.errors import UserError
from shards.index import open_dataset
from shards.staging import STAGING, staged
from shards.store import LocalStore
from shards.verify import verify
from shards.writer import write_shard


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Killed(BaseException):
    """Nothing catches it, as nothing catches kill -9."""


def build_until(n_shards, monkeypatch, error, **options):
    """Build, with an error raised when that many shards are done."""
    written = []

    def write(job):
        if len(written) == n_shards:
            raise error
        written.append(job.name)
        return write_shard(job)

    with monkeypatch.context() as patch:
        patch.setattr(shards.build, "write_shard", write)
        with pytest.raises(UserError if isinstance(error, OSError) else type(error)) as caught:
            build(workers=1, **options)
    return caught.value


@pytest.mark.parametrize(("mode", "at_least"), [("at_every_step", 20), ("while_overwriting", 15), ("at_random", 20)])
def test_killed_builds_end_as_undisturbed_ones(tmp_path, pets, mode, at_least):
    script = Path(__file__).with_name("killed_builds.py")
    run = subprocess.run([sys.executable, script, mode, pets, tmp_path], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.split("kills:")[1]) >= at_least


def test_killed_with_workers_none_lives_on_and_the_rest_is_built(tmp_path, pets):
    options = ["--source", str(pets), "--shard-samples", "1", "--workers", "2", "--out"]
    command = [sys.executable, "-m", "shards", "build", "folder", *options]
    build("folder", source=pets, out=tmp_path / "whole" / "out", shard_samples=1, workers=1)
    chance = random.Random(0)
    done = 0
    while not (tmp_path / "out" / "dataset.json").exists():
        process = subprocess.Popen([*command, "out"], cwd=tmp_path, stderr=subprocess.DEVNULL, start_new_session=True)
        until = time.monotonic() + 60
        wanted = min(done + chance.randint(7, 12), 20)
        while process.poll() is None and len(list((tmp_path / "out" / STAGING).glob("t*-*.json"))) < wanted:
            assert time.monotonic() < until
            time.sleep(0.005)
        process.kill()
        process.wait()
        workers_gone = time.monotonic() + 20
        while group_lives(process.pid):
            assert time.monotonic() < workers_gone, "a worker lives on"
            time.sleep(0.01)
        done = wanted
    assert contents(tmp_path / "out") == contents(tmp_path / "whole" / "out")


def group_lives(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_it_says_how_far_it_is(tmp_path, pets, monkeypatch, capsys):
    options = {"dataset": "folder", "source": pets, "out": tmp_path / "out", "shard_samples": 2}
    build_until(3, monkeypatch, Killed(), **options)
    capsys.readouterr()
    build(workers=1, **options)
    assert "continuing: 3 of 11 shards done\n" in capsys.readouterr().err


def test_other_options_do_not_go_on_with_it(tmp_path, pets, monkeypatch):
    options = {"dataset": "folder", "source": pets, "out": tmp_path / "out", "shard_samples": 2}
    build_until(3, monkeypatch, Killed(), **options)
    with pytest.raises(UserError) as error:
        build(**options, seed=1)
    assert str(error.value) == (
        f"{tmp_path / 'out'} holds an unfinished build with seed 0, not 1;"
        " give --overwrite to start over, or another --out"
    )
    build(**options, seed=1, overwrite=True)
    assert open_dataset(tmp_path / "out").manifest["options"]["seed"] == 1
    assert not (tmp_path / "out" / STAGING).exists()


def test_another_encoder_does_not_go_on_with_it(tmp_path, pets, monkeypatch):
    options = {"dataset": "folder", "source": pets, "out": tmp_path / "out", "shard_samples": 2}
    build_until(3, monkeypatch, Killed(), **options)
    monkeypatch.setattr(shards.build, "ENCODER", "Pillow 99")
    with pytest.raises(UserError, match=r"holds an unfinished build with encoder 'Pillow .*', not 'Pillow 99'"):
        build(**options)


def test_a_record_without_its_shard_is_not_believed(tmp_path, pets, monkeypatch, capsys):
    options = {"dataset": "folder", "source": pets, "out": tmp_path / "out", "shard_samples": 2}
    build_until(3, monkeypatch, Killed(), **options)
    tar = next((tmp_path / "out" / STAGING).glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:1024])
    build(workers=1, **options)
    assert "continuing: 2 of 11 shards done\n" in capsys.readouterr().err
    assert verify(tmp_path / "out", workers=1) == []


@pytest.mark.parametrize("there_already", [False, True])
def test_a_full_disk_is_one_line_and_the_build_goes_on(tmp_path, pets, monkeypatch, there_already):
    out = tmp_path / "new" / "out"
    options = {"dataset": "folder", "source": pets, "out": out, "shard_samples": 2, "overwrite": there_already}
    if there_already:
        build(workers=1, **{**options, "seed": 1})
    before = contents(out) if there_already else {}
    error = build_until(3, monkeypatch, OSError(28, "No space left on device"), **options)
    assert str(error) == (
        f"{out} cannot be written: No space left on device; fix that or give another --out"
        " (shards that are done are kept, and the same command resumes the build)"
    )
    assert contents_without_staging(out) == before
    assert not list((out / STAGING).glob("*.tmp"))
    build(workers=1, **options)
    assert verify(out, workers=1) == []
    assert open_dataset(out).manifest["options"]["seed"] == 0


def contents_without_staging(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != STAGING}


def test_half_a_file_is_removed_when_writing_fails(tmp_path):
    def fail(staging):
        with staging.writing("a.tar", "a.idx") as (tar, _):
            tar.write_bytes(b"half")
            raise OSError(28, "No space left on device")

    with staged(LocalStore(tmp_path / "out")) as staging:
        with pytest.raises(OSError, match="No space"):
            fail(staging)
        assert staging.sizes().keys() == {"lock"}
    assert os.listdir(tmp_path) == []


def test_an_interrupt_says_that_the_same_command_goes_on(tmp_path, pets, monkeypatch, capsys):
    options = {"dataset": "folder", "source": pets, "out": tmp_path / "out", "shard_samples": 2}
    build_until(2, monkeypatch, KeyboardInterrupt(), **options)
    assert capsys.readouterr().err.endswith(f"{tmp_path / 'out'} is unfinished; the same command resumes it\n")


def test_a_second_builder_is_refused(tmp_path, pets):
    out = tmp_path / "out"
    with staged(LocalStore(out)), pytest.raises(UserError) as error:
        build("folder", source=pets, out=out, workers=1)
    holder = f"process {os.getpid()} on {os.uname().nodename}"
    assert str(error.value) == f"{out} is being built by {holder}; wait for it or give another --out"
    assert os.listdir(tmp_path) == []


def test_a_lock_whose_file_was_removed_is_taken_anew(tmp_path, monkeypatch):
    flock = fcntl.flock
    removals = []

    def late(descriptor, operation):
        if not removals:  # the holder before ends between opening and locking
            removals.append((tmp_path / "out" / STAGING / "lock").unlink())
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with staged(LocalStore(tmp_path / "out")) as staging:
        assert staging.sizes().keys() == {"lock"}


def test_files_of_others_are_in_the_way_of_an_unfinished_build(tmp_path, pets, monkeypatch):
    options = {"dataset": "folder", "source": pets, "out": tmp_path / "out", "shard_samples": 2}
    build_until(2, monkeypatch, Killed(), **options)
    (tmp_path / "out" / "notes.md").write_text("mine")
    with pytest.raises(UserError, match="exists and is not a dataset"):
        build(**options)


def test_the_old_options_leave_an_unfinished_overwrite_alone(tmp_path, pets, monkeypatch, capsys):
    options = {"dataset": "folder", "source": pets, "out": tmp_path / "out", "shard_samples": 2}
    build(workers=1, **options)
    build_until(2, monkeypatch, Killed(), **options, seed=1, overwrite=True)
    build(workers=1, **options)
    assert "already built" in capsys.readouterr().err
    build(workers=1, **options, seed=1, overwrite=True)
    assert "continuing: 2 of 11" in capsys.readouterr().err
    build_until(2, monkeypatch, Killed(), **options, seed=1, overwrite=True)
    build(workers=1, **options, seed=1)  # complete already: what the unfinished repetition left is of no use
    assert not (tmp_path / "out" / STAGING).exists()


def test_strict_names_the_image_and_loses_nothing(tmp_path, pets, capsys):
    options = {"dataset": "folder", "source": pets, "out": tmp_path / "out", "workers": 1}
    with pytest.raises(UserError) as error:
        build(**options, strict=True)
    assert str(error.value) == (
        "cat/text.jpg: not an image; fix or remove it, or leave out --strict to build without it"
    )
    with pytest.raises(UserError, match=r"cat/text\.jpg: not an image"):  # also when its shard is there already
        build(**options, strict=True)
    build(**options)
    assert "continuing: " in capsys.readouterr().err
    with pytest.raises(UserError, match=r"was built without images that rejected\.jsonl names \(1\); leave out --"):
        build(**options, strict=True)


def test_no_permission_is_one_line(tmp_path, pets, permissions):
    (tmp_path / "mine").mkdir(mode=0o500)
    with pytest.raises(UserError, match="cannot be written: Permission denied"):
        build("folder", source=pets, out=tmp_path / "mine" / "out", workers=1)


def test_images_that_change_while_they_are_built_are_rejected(tmp_path, image_folder, monkeypatch):
    source = image_folder(tmp_path / "source", {"a": 3, "b": 3})
    plan_splits = shards.build.plan_splits

    def change(*args, **kwargs):
        with (source / "a" / "000.png").open("ab") as file:
            file.write(b"more")
        return plan_splits(*args, **kwargs)

    monkeypatch.setattr(shards.build, "plan_splits", change)
    out = build("folder", source=source, out=tmp_path / "out", workers=1, test_fraction=0, val_fraction=0)
    (line,) = (out / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == "changed since it was listed"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_source_that_is_unplugged_stops_the_build_and_costs_no_image(tmp_path, image_folder, monkeypatch, workers):
    """Or the rest of it would be listed as rejected, and a dataset of what was read before be published."""
    source = image_folder(tmp_path / "source", {"a": 9, "b": 9})
    options = {"dataset": "folder", "source": source, "out": tmp_path / "out", "shard_samples": 3}
    write_shards = shards.build._write_shards

    def unplugged(*args):
        source.rename(tmp_path / "elsewhere")
        write_shards(*args)

    with monkeypatch.context() as patch:
        patch.setattr(shards.build, "_write_shards", unplugged)
        with pytest.raises(
            UserError, match=r"source/[ab] was there when the images were listed and is not any more \(No"
        ):
            build(workers=workers, **options)
    (tmp_path / "elsewhere").rename(source)
    build(workers=1, **options)
    assert open_dataset(tmp_path / "out").manifest["rejected"]["total"] == 0


def test_too_little_memory_is_no_fault_of_the_image(tmp_path, image_folder, monkeypatch):
    source = image_folder(tmp_path / "source", {"a": 3, "b": 3})
    options = {"dataset": "folder", "source": source, "out": tmp_path / "out", "workers": 1}

    def lacking(*_, **__):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("shards.encode._encode", lacking)
        with pytest.raises(
            UserError, match=r"not enough memory to build \S+/out; resume with the same command and fewer --workers"
        ):
            build(**options)
    build(**options)
    assert open_dataset(tmp_path / "out").manifest["rejected"]["total"] == 0


def test_an_unfinished_build_that_remembers_nothing_begins_anew(tmp_path, pets, monkeypatch):
    options = {"dataset": "folder", "source": pets, "out": tmp_path / "out", "shard_samples": 2}
    build_until(3, monkeypatch, Killed(), **options)
    (tmp_path / "out" / STAGING / "findings.json").unlink()  # as an earlier version left it
    build(workers=1, **options)
    assert verify(tmp_path / "out", workers=1) == []


def test_classes_that_look_the_same_are_reported(tmp_path, image_folder, capsys):
    source = image_folder(tmp_path / "source", {"Cat": 2, "cat": 2, "été": 2, "e\u0301te\u0301": 2, "dog": 2})
    build("folder", source=source, out=tmp_path / "out", workers=1, test_fraction=0, val_fraction=0)
    assert (
        "note: classes whose names differ only in case, spaces or how accents are written: 2 ('Cat' and 'cat', "
    ) in capsys.readouterr().err


def test_a_late_shard_of_another_build_is_not_taken(tmp_path, pets, monkeypatch):
    """A worker of a cluster ends its shard when its builder is gone."""
    options = {"dataset": "folder", "source": pets, "workers": 1, "shard_samples": 4}
    write_shards, late = shards.build._write_shards, []

    def interrupted(staging, jobs, *others):
        late.append(jobs[0])
        raise KeyboardInterrupt

    def late_one(staging, jobs, *others):
        write_shard(late[0])
        write_shards(staging, jobs, *others)

    monkeypatch.setattr(shards.build, "_write_shards", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(**options, out=tmp_path / "out", seed=1)
    monkeypatch.setattr(shards.build, "_write_shards", late_one)
    build(**options, out=tmp_path / "out", seed=0, overwrite=True)
    monkeypatch.undo()
    assert contents(tmp_path / "out") == contents(build(**options, out=tmp_path / "undisturbed" / "out", seed=0))


def test_strict_looks_again_at_an_image_that_was_fixed(tmp_path, image_folder):
    source = image_folder(tmp_path / "source", {"a": 6, "b": 6})
    options = {"source": source, "out": tmp_path / "out", "workers": 1, "shard_samples": 2, "strict": True}
    image = sorted((source / "a").iterdir())[3]
    good = image.read_bytes()
    image.write_bytes(bytes(len(good)))
    with pytest.raises(UserError, match="not an image; fix or remove it"):
        build("folder", **options)
    image.write_bytes(good)
    assert open_dataset(build("folder", **options)).manifest["rejected"]["total"] == 0


def test_the_lock_is_closed_before_its_folder_goes(tmp_path, monkeypatch):
    """NFS keeps a file that is deleted while it is open, under another name, in its folder."""
    rmdir = os.rmdir

    def as_nfs(path, *args, **options):
        links = [f"/proc/self/fd/{n}" for n in os.listdir("/proc/self/fd")]
        opened = {os.readlink(link) for link in links if os.path.lexists(link)}
        if any(name.removesuffix(" (deleted)").endswith(f"{STAGING}/lock") for name in opened):
            raise OSError(39, "Directory not empty")
        rmdir(path, *args, **options)

    monkeypatch.setattr(os, "rmdir", as_nfs)
    with staged(LocalStore(tmp_path / "new" / "out")):
        pass
    assert os.listdir(tmp_path) == []


def test_one_late_shard_costs_no_other(tmp_path, pets, monkeypatch, capsys):
    """It takes the place of one that is done; the command that is given again writes that one alone."""
    options = {"dataset": "folder", "source": pets, "out": tmp_path / "out", "workers": 1, "shard_samples": 4}
    write_shards = shards.build._write_shards

    def then_a_late_one(staging, jobs, *others):
        write_shards(staging, jobs, *others)
        write_shard(replace(jobs[0], build="another"))

    with monkeypatch.context() as patch:
        patch.setattr(shards.build, "_write_shards", then_a_late_one)
        with pytest.raises(UserError, match="another build was at work in the same place; give the same command again"):
            build(**options)
    capsys.readouterr()
    build(**options)
    assert "continuing: 6 of 7 shards" in capsys.readouterr().err
    assert contents(tmp_path / "out") == contents(build(**{**options, "out": tmp_path / "undisturbed" / "out"}))
