"""An unfinished build: what is done of it waits in OUT/.build, until all of it is moved into OUT at once.

    data/inat2018/.build/
        lock                      held while a builder runs; says who
        plan.json                 what is being built: only the same command continues it; as old as its list of images
        findings.json             what was found out about the images before (findings.py)
        train-000012.tar  .idx    a shard that is done,
        train-000012.npy  .names.txt    its rows of the samples array and where its images came from,
        train-000012.pictures     what tells its pictures apart, 16 bytes each (copies.py),
        train-000012.json         and its record, written last: a shard with one is never made again
        dataset.json              written when everything is there, to be moved
        old.json                  the manifest of the dataset whose place is taken, while it is taken

Files appear under their names whole. So a builder may be killed at any moment, and the same command resumes
with what it finds.
"""

import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.index import MANIFEST, STAGING
from shards.store import LOCK, TEMPORARY, Store

PLAN = "plan.json"
FINDINGS = "findings.json"
OLD_MANIFEST = "old.json"
REJECTED = "rejected.jsonl"


@dataclass(frozen=True)
class Staging:
    """The files that wait in the sub-folder .build of `store`, by their names in it."""

    store: Store

    def writing(self, *names: str) -> AbstractContextManager[list[Path]]:
        """Give paths to write to; when the block ends well the files get their names, whole and for good."""
        return self.store.writing([f"{STAGING}/{name}" for name in names])

    def write_json(self, name: str, value: Any, as_of: int | None = None) -> None:
        """Write a value as `dataset.json` is written; the file's own time becomes `as_of`, nanoseconds since 1970."""
        with self.writing(name) as (path,):
            text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False)
            path.write_text(text + "\n", encoding="utf-8")
            if as_of is not None:
                os.utime(path, ns=(as_of, as_of))

    def as_of(self, name: str) -> int:
        """Return the time of a file that waits."""
        return self.store.as_of(f"{STAGING}/{name}")

    def read(self, name: str) -> bytes:
        """Read a file that waits."""
        return self.store.read(f"{STAGING}/{name}")

    def read_json(self, name: str) -> Any:
        """Read a file that `write_json` wrote; None if there is none."""
        try:
            return json.loads(self.read(name))
        except FileNotFoundError:
            return None

    def sizes(self) -> dict[str, int]:
        """Return the names and bytes of the files that wait."""
        return self.store.sizes(STAGING)

    def delete(self, names: list[str]) -> None:
        """Delete files that wait."""
        self.store.delete(f"{STAGING}/{name}" for name in names)

    def clear(self, keep: str = "") -> None:
        """Delete what waits, but for one file; the plan goes first, so that what a crash leaves is no build."""
        names = self.sizes().keys() - {LOCK, keep, PLAN}
        self.delete([PLAN])
        self.delete(sorted(names))

    def recover(self) -> dict[str, Any] | None:
        """Mend what a killed builder left; return the manifest of a dataset that was complete and is in place now."""
        names = self.sizes()
        self.delete([name for name in names if name.endswith(TEMPORARY)])
        return self.publish() if MANIFEST in names else None

    def publish(self) -> dict[str, Any]:
        """Move the finished dataset out of .build, the manifest last; there is no dataset in between.

        The old dataset's files are deleted.
        """
        if MANIFEST in (self.store.names() or ()):
            self.store.move([(MANIFEST, f"{STAGING}/{OLD_MANIFEST}")])
        manifest: dict[str, Any] = self.read_json(MANIFEST)
        old = self.read_json(OLD_MANIFEST)
        names = file_names(manifest)
        if old is not None:
            self.store.delete(sorted(file_names(old) - names))
        waiting = names & self.sizes().keys()  # the others were moved before a crash
        self.store.move((f"{STAGING}/{name}", name) for name in sorted(waiting - {MANIFEST}))
        self.clear(keep=MANIFEST)
        self.store.move([(f"{STAGING}/{MANIFEST}", MANIFEST)])
        return manifest


@contextmanager
def staged(store: Store) -> Iterator[Staging]:
    """Yield the staging folder of `store`, locked; at the end it is removed if nothing waits in it."""
    with store.locked(STAGING):
        yield Staging(store)


def file_names(manifest: dict[str, Any]) -> set[str]:
    """Return the names of all files that a dataset consists of."""
    names = {MANIFEST, REJECTED}
    for split in manifest["splits"].values():
        names |= set(split["files"])
        for shard in split["shards"]:
            names |= {shard["file"], Path(shard["file"]).with_suffix(".idx").name}
    return names
