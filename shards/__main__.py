"""`python -m shards build|verify|inspect`."""

import signal
import sys

from shards.build import build
from shards.cli import program_name, run_commands
from shards.duplicates import find_duplicates, report
from shards.errors import UserError
from shards.index import open_dataset
from shards.show import inspect as show
from shards.show import lost_shards
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


def inspect(root: str, duplicates: bool = False, workers: int | None = None) -> None:
    """Show a dataset's splits, its tail and its images. Exits with status 1 if a shard is missing or cut off.

    Args:
        root: the dataset's folder or URL.
        duplicates: list images that are identical or look alike instead, those in different splits first. All
            images are read.
        workers: processes that do it; if not given, one per available core.
    """
    if workers is not None and workers < 1:
        raise UserError(f"--workers is {workers}; give a whole number of at least 1")
    dataset = open_dataset(root)
    problems = lost_shards(dataset)
    if not duplicates:
        print(show(dataset))
    elif not problems:
        for line in report(find_duplicates(dataset, workers), dataset.classes):
            print(line)
    for problem in problems:
        print(problem)
    if problems:
        sys.exit(1)


def main(argv: list[str] | None = None) -> None:
    """Run one command."""
    program = program_name("python -m shards")
    # A plain SIGTERM would leave worker processes and half-written files; leaving by an exception clears them up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        run_commands(program, {"build": build, "verify": verify, "inspect": inspect}, argv)
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
