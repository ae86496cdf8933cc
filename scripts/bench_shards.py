"""How fast shards are built, beside what else one could use, on JPEGs of 800x600 shrunk to a shorter side of 256.

    .venv/bin/python scripts/bench_shards.py --json FILE

Measures by turns in one run: `python -m shards build` with one worker and with two, a plain loop of ordinary Pillow and
webdataset's TarWriter, and MosaicML's MDSWriter (the latter two in an environment that is made for it with uv and
thrown away). `images_per_second` is what counts: the same commands are also run on a tenth of the images, and the time
of that is subtracted, with starting Python and importing libraries in it. `with_start` is of the whole commands.
"""

import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from bench.common import ROOT, header, peer_environments, write_photographs, write_results
from bench.measuring import timed
from shards.cli import run_commands
from shards.errors import UserError
from shards.progress import say

SIZE = (800, 600)
CLASSES = 20
PEERS = {"plain": ["pillow", "webdataset"], "mosaicml": ["pillow", "mosaicml-streaming"]}
SOURCE, OUT = "SOURCE", "OUT"  # in a command, for paths


def bench(json: Path = Path("bench_shards.json"), images: int = 4000, rounds: int = 5) -> None:
    """Measure and write the results.

    Args:
        json: the file to write.
        images: how many JPEGs to make and build from, at least 200.
        rounds: how often everything is measured, by turns.
    """
    for option, value, least in (("--images", images, 200), ("--rounds", rounds, 1)):
        if value < least:
            raise UserError(f"{option} {value} is too small; give at least {least}")
    with tempfile.TemporaryDirectory() as folder:
        write_results(json, _measure(Path(folder), images, rounds))


def _measure(folder: Path, images: int, rounds: int) -> dict[str, Any]:
    sources = {images: folder / "source", images // 10: folder / "tenth"}
    say(f"making {images} JPEGs")
    mean_bytes = {
        n: write_photographs(source, (i % CLASSES for i in range(n)), lambda _: SIZE) for n, source in sources.items()
    }
    ours = [sys.executable, "-m", "shards", "build", "folder", "--shorter-side", "256", "--quality", "90"]
    ours += ["--test-fraction", "0", "--val-fraction", "0", "--shard-samples", str(images // 20)]
    commands = {
        f"ours, {n} worker{'s' * (n > 1)}": [*ours, "--workers", str(n), "--source", SOURCE, "--out", OUT]
        for n in (1, 2)
    }
    skipped: dict[str, str] = {}
    for peer, python in peer_environments(folder, PEERS, skipped).items():
        commands[peer] = [str(python), str(ROOT / "scripts/bench/shards_peers.py"), peer, SOURCE, OUT]

    runs: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for i in range(rounds):
        for name, command in commands.items():
            run, tenth = (run_on(command, sources[n], folder / "out") for n in sources)
            runs[name].append(run | {f"tenth_{key}": tenth[key] for key in ("seconds", "cpu_seconds")})
            say(f"round {i + 1}, {name}: {run['seconds']:.1f} s, {tenth['seconds']:.1f} s for a tenth")
    results = {name: rates(of, images) for name, of in runs.items()}
    return header(pillow=Image.__version__) | {
        "images": images,
        "mean_bytes": mean_bytes[images],
        "results": results,
        "skipped": skipped,
        "one_worker_over_plain": ratio(results, "ours, 1 worker", "plain"),
        "one_worker_over_plain_per_cpu_second": ratio(results, "ours, 1 worker", "plain", "cpu_second"),
        "one_worker_over_mosaicml": ratio(results, "ours, 1 worker", "mosaicml"),
        "two_workers_over_one": ratio(results, "ours, 2 workers", "ours, 1 worker"),
        "rss_growth_mb": max(run["rss_growth_mb"] for name in runs if name.startswith("ours") for run in runs[name]),
    }


def rates(runs: list[dict[str, float]], images: int) -> dict[str, Any]:
    """Images per second and per CPU second, without what starting takes; and with it."""
    result: dict[str, Any] = {}
    for key in ("seconds", "cpu_seconds"):
        more = statistics.median(run[key] for run in runs) - statistics.median(run[f"tenth_{key}"] for run in runs)
        if more <= 0:
            raise RuntimeError(f"{images} images took no longer than {images // 10}; measure more images")
        result[f"images_per_{key.removesuffix('s')}"] = (images - images // 10) / more
    return result | {"with_start": images / statistics.median(run["seconds"] for run in runs), "runs": runs}


def run_on(command: list[str], source: Path, out: Path) -> dict[str, float]:
    """Time a command on a source; what it writes is deleted."""
    paths = {SOURCE: str(source), OUT: str(out)}
    result = timed([paths.get(word, word) for word in command], cwd=out.parent)
    shutil.rmtree(out)
    return result


def ratio(results: dict[str, dict[str, Any]], one: str, other: str, per: str = "second") -> float | None:
    """How many times the other's images per second; None where one was not measured."""
    if one not in results or other not in results:
        return None
    return float(results[one][f"images_per_{per}"] / results[other][f"images_per_{per}"])


if __name__ == "__main__":
    run_commands("scripts/bench_shards.py", bench)
