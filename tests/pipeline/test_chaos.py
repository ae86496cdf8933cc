import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# By hand more of them: python tests/pipeline/chaos.py KIND DATASET FOLDER $(seq 100)
SEEDS = {
    "dali": (1, 3, 4, 6, 11, 12, 17, 23),
    "resident": (1, 3, 4, 6, 11, 12, 17, 23),
    "torch": (1, 3, 4, 6, 11, 12, 17),
    "workers": (1, 4, 11),
}
LIMIT = 120  # seconds, for what takes about ten


@pytest.fixture(scope="module")
def processes(photos, tmp_path_factory) -> Iterator[dict[str, subprocess.Popen]]:
    """All kinds at the same time: most of the time goes by with importing and waiting."""
    started = {}
    for kind, seeds in SEEDS.items():
        arguments = [kind, photos.root, tmp_path_factory.mktemp(kind), *seeds]
        script = Path(__file__).with_name("chaos.py")
        command = [sys.executable, "-X", "faulthandler", script, *map(str, arguments)]
        started[kind] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    yield started
    for process in started.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("kind", SEEDS)
def test_damaged_shards_end_in_a_mended_stream_or_a_named_error(processes, kind):
    out, err = processes[kind].communicate(timeout=LIMIT)
    assert processes[kind].returncode == 0, err
    outcomes = out.splitlines()
    if kind == "workers":
        assert outcomes.pop().startswith("kill: error: a worker process of the torch loader was killed")
    assert len(outcomes) == len(SEEDS[kind]), err
    for outcome in outcomes:
        assert re.search(
            r": (whole|mended|error: .*(\.tar|train decodes:).* run: python -m shards verify .*)$", outcome
        )
    assert any(outcome.endswith(": mended") for outcome in outcomes)
    assert any(": error: " in outcome for outcome in outcomes)
    assert "Traceback" not in err
