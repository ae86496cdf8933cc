"""What the user sees while something long runs: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from unicodedata import category

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 5.0


def say(line: str) -> None:
    """Print one line on stderr, without breaking a running bar; names in it do not steer the terminal."""
    shown = "".join(c.encode("unicode_escape").decode() if category(c) in ("Cc", "Zl", "Zp") else c for c in line)
    tqdm.write(shown, file=sys.stderr)


class Progress:
    """Counts images, or another unit, towards `total`, `done` of which need no work any more; use it in a `with` block.

    Without a `total` it says how many there are so far.
    """

    def __init__(self, task: str, total: int | None, done: int = 0, unit: str = "images") -> None:
        self.task, self.unit = task, unit
        self.total = total
        self.done = self.start_done = done
        self.start = self.last_line = time.monotonic()
        self.bar = tqdm(
            total=total,
            initial=done,
            desc=task,
            unit=f" {unit}",
            disable=not sys.stderr.isatty(),
            leave=False,
            file=sys.stderr,
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
            rate = max(self.done - self.start_done, 1) / (now - self.start)
            if self.total is None:
                parts = [f"{self.done:,} {self.unit} so far", f"{rate:,.0f}/s", note]
            else:
                left = tqdm.format_interval((self.total - self.done) / rate)
                parts = [f"{self.done:,} of {self.total:,} {self.unit}", f"{rate:,.0f}/s", f"{left} left", note]
            say(f"{self.task}: " + ", ".join(part for part in parts if part))
