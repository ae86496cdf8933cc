"""Checkpoints on disk: whole or not there, kept to a number, and passed over where damaged."""

import os
import shutil

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from shards.errors import UserError
from train.engine import checkpoints
from train.engine.checkpoints import Counters, load_checkpoint, read_selected, save_checkpoint, save_selected


def save(folder, step: int, keep: int = 2) -> None:
    network = nn.Linear(2, 1)
    nn.init.constant_(network.weight, step)
    save_checkpoint(folder, network, {"optimizer": {"step": step}}, Counters(step=step, epoch_seconds=step / 3), keep)


def names(folder) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_what_was_saved_comes_back(tmp_path):
    save(tmp_path, 7)
    network = nn.Linear(2, 1)
    states, counters = load_checkpoint(tmp_path, network)
    assert states == {"optimizer": {"step": 7}}
    assert counters == Counters(step=7, epoch_seconds=7 / 3)
    assert network.weight.tolist() == [[7, 7]]


def test_a_run_without_checkpoints_has_none(tmp_path):
    assert load_checkpoint(tmp_path, nn.Linear(2, 1)) is None


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_are_kept(tmp_path, keep):
    for step in (9, 10, 100, 1000):
        save(tmp_path, step, keep)
    assert names(tmp_path) == ["step-00000010", "step-00000100", "step-00001000"][3 - keep :]


def test_what_somebody_keeps_beside_them_is_left_alone(tmp_path):
    save(tmp_path, 1)
    for copy in ("step-00000001-mine", "step-00000009-mine"):
        shutil.copytree(tmp_path / "checkpoints/step-00000001", tmp_path / "checkpoints" / copy)
    save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["step-00000001-mine", "step-00000002", "step-00000009-mine"]
    _, counters = load_checkpoint(tmp_path, nn.Linear(2, 1))
    assert counters.step == 2


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "sums.json"])
@pytest.mark.parametrize("damage", ["gone", "cut", "one bit"])
def test_a_damaged_newest_is_skipped_for_the_one_before(tmp_path, capsys, name, damage):
    save(tmp_path, 1)
    save(tmp_path, 2)
    path = tmp_path / "checkpoints/step-00000002" / name
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "one bit":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    network = nn.Linear(2, 1)
    states, counters = load_checkpoint(tmp_path, network)
    assert (states["optimizer"]["step"], counters.step, network.weight[0, 0].item()) == (1, 1, 1)
    reported = capsys.readouterr().err
    assert reported.startswith(f"warning: {tmp_path}/checkpoints/step-00000002 is damaged (")
    assert reported.endswith("; skipped\n")
    assert reported.count("\n") == 1


def test_when_all_are_damaged_the_remedy_is_reported(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "checkpoints/step-00000001/state.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"every checkpoint of .* is damaged; remove .*/checkpoints to start"):
        load_checkpoint(tmp_path, nn.Linear(2, 1))


def test_a_checkpoint_of_another_network_is_not_taken_for_damaged(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    with pytest.raises(UserError, match=r"step-00000002/model\.safetensors is of another model"):
        load_checkpoint(tmp_path, nn.Linear(3, 1))


def test_a_failed_save_leaves_the_old_one_and_no_rest(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001"]


def test_what_a_kill_left_is_cleared_away(tmp_path):
    (tmp_path / "checkpoints/.partial/x").mkdir(parents=True)
    save(tmp_path, 1)
    assert names(tmp_path) == ["step-00000001"]


def test_weights_in_any_memory_layout(tmp_path):
    network = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    checkpoints.save_checkpoint(tmp_path, network, {}, Counters(), 1)
    again = nn.Conv2d(3, 4, 3)
    load_checkpoint(tmp_path, again)
    assert torch.equal(again.weight, network.weight)


def test_the_selected_weights_and_what_is_said_of_them_are_one_file(tmp_path, monkeypatch):
    assert read_selected(tmp_path) is None
    save_selected(tmp_path, nn.Linear(2, 1), 3, 0.1 + 0.2)
    path, epoch, score = read_selected(tmp_path)
    assert (path, epoch, score) == (tmp_path / "checkpoints/selected.safetensors", 3, 0.1 + 0.2)
    assert names(tmp_path) == ["selected.safetensors"]

    def killed(*_):
        raise KeyboardInterrupt

    before = path.read_bytes()
    monkeypatch.setattr("shards.atomic.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_selected(tmp_path, nn.Linear(2, 1), 4, 0.5)
    assert path.read_bytes() == before
    assert names(tmp_path) == ["selected.safetensors"]


def test_selected_weights_of_an_older_run_have_a_file_beside_them(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    network = nn.Linear(2, 1)
    save_file(network.state_dict(), tmp_path / "checkpoints/selected.safetensors")
    assert read_selected(tmp_path) is None  # killed before that was written
    (tmp_path / "checkpoints/selected.json").write_text('{"epoch": 2, "balanced_accuracy": 0.25}')
    assert read_selected(tmp_path)[1:] == (2, 0.25)
    save_selected(tmp_path, network, 3, 0.5)
    assert read_selected(tmp_path)[1:] == (3, 0.5)
    assert names(tmp_path) == ["selected.safetensors"]


@pytest.mark.parametrize("content", [b"", b"cut", b"header"])
def test_damaged_selected_weights_are_not_used(tmp_path, capsys, content):
    save_selected(tmp_path, nn.Linear(2, 1), 3, 0.5)
    path = tmp_path / "checkpoints/selected.safetensors"
    whole = path.read_bytes()
    path.write_bytes({b"cut": whole[:-2], b"header": whole[:20]}.get(content, content))
    assert read_selected(tmp_path) is None
    assert f"warning: {path} is damaged" in capsys.readouterr().err
