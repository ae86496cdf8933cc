import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

KINDS = ("dali", "resident,torch,workers")
# By hand more of them: python tests/pipeline/chaos.py KIND,… DATASET FOLDER $(seq 100)
SEEDS = (1, 4, 6, 11, 12)
LIMIT = 120  # seconds, for what takes about ten


@pytest.fixture(scope="module")
def processes(photos, tmp_path_factory) -> Iterator[dict[str, subprocess.Popen]]:
    """All at the same time: most of the time goes by with importing and waiting."""
    started = {}
    for kinds in KINDS:
        arguments = [kinds, photos.root, tmp_path_factory.mktemp("chaos"), *SEEDS]
        command = [sys.executable, "-X", "faulthandler", Path(__file__).with_name("chaos.py"), *map(str, arguments)]
        started[kinds] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    yield started
    for process in started.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("kinds", KINDS)
def test_damaged_shards_end_in_a_mended_stream_or_a_named_error(processes, kinds):
    out, err = processes[kinds].communicate(timeout=LIMIT)
    assert processes[kinds].returncode == 0, err
    assert "Traceback" not in err
    for kind in kinds.split(","):
        outcomes = [line.removeprefix(f"{kind}: ") for line in out.splitlines() if line.startswith(f"{kind}: ")]
        if kind == "workers":
            assert outcomes.pop().startswith("kill: error: a worker process of the torch loader was killed")
        assert len(outcomes) == len(SEEDS)
        for outcome in outcomes:
            assert re.match(r"\w+: (whole$|replaced$|error: .*(\.tar|train decodes:).* tailstream verify /)", outcome)
        assert any(outcome.endswith(": replaced") for outcome in outcomes)
        assert any(": error: " in outcome for outcome in outcomes)
