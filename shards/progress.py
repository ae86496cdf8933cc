"""What the user sees while something long runs: a bar on a terminal, a line now and then elsewhere."""

import sys
import time

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0


def say(line: str) -> None:
    """Print one line on stderr, without breaking a running bar."""
    tqdm.write(line, file=sys.stderr)


class Progress:
    """Counts images towards `total`; use it in a `with` block."""

    def __init__(self, task: str, total: int) -> None:
        self.task = task
        self.total = total
        self.done = 0
        self.start = self.last_line = time.monotonic()
        self.bar = tqdm(
            total=total, desc=task, unit=" images", disable=not sys.stderr.isatty(), leave=False, file=sys.stderr
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def add(self, images: int, note: str = "") -> None:
        """Count `images` more; `note` says how it goes."""
        self.done += images
        self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(images)
        now = time.monotonic()
        if self.bar.disable and now - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = now
            rate = self.done / (now - self.start)
            say(f"{self.task}: {self.done:,} of {self.total:,} images, {rate:,.0f}/s {note}".rstrip())
