"""`python -m shards build|verify|inspect`."""

import signal
import sys

from shards.build import build
from shards.cli import run_commands
from shards.index import open_dataset
from shards.show import inspect as show
from shards.verify import verify as find_problems


def verify(root: str, decode: bool = True, workers: int | None = None) -> None:
    """Read a dataset again and compare everything with its manifest.

    Prints a line per problem and exits with status 1 if there is one.

    Args:
        root: the dataset's folder or URL.
        decode: also decode every image.
        workers: processes; if not given, one per available core.
    """
    problems = find_problems(root, decode=decode, workers=workers)
    for problem in problems:
        print(problem)
    if problems:
        sys.exit(1)
    print(f"{root}: no problem found")


def inspect(root: str) -> None:
    """Show a dataset's splits, its tail and its images.

    Args:
        root: the dataset's folder or URL.
    """
    print(show(open_dataset(root)))


def main() -> None:
    """Run one command."""
    # A plain SIGTERM would leave worker processes and half-written files; leaving by an exception clears them up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        run_commands("python -m shards", {"build": build, "verify": verify, "inspect": inspect})
    except KeyboardInterrupt:
        print("python -m shards: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
