"""What our HTML pages share: colours, the template environment, and how a page is written."""

import os
from contextlib import suppress
from pathlib import Path

import jinja2

from analysis.metrics import percent, points
from shards.errors import UserError

# Name: colour on a light page, colour on a dark one; no two alike, since a figure's colours are found by value.
# The entries' are those of Okabe and Ito, which colour-blind eyes distinguish, behind a grey for the baseline.
PALETTE = {
    "paper": ("#ffffff", "#14171c"),
    "panel": ("#f6f7f9", "#1c2027"),
    "ink": ("#1b1f27", "#e9ebef"),
    "muted": ("#5f6774", "#9ba3b0"),
    "rule": ("#dfe2e7", "#333a45"),
    "many": ("#45408a", "#8f88e0"),
    "medium": ("#8a84cc", "#645db0"),
    "few": ("#cbc7ee", "#453f80"),
    "entry0": ("#78808d", "#a3abb8"),
    "entry1": ("#0072b2", "#4aa8e0"),
    "entry2": ("#d55e00", "#f08541"),
    "entry3": ("#009e73", "#2fc498"),
    "entry4": ("#cc79a7", "#dd93bb"),
    "entry5": ("#b58900", "#e0b23a"),
    "entry6": ("#2aa5c9", "#7fd0ea"),
    "entry7": ("#7a2e1f", "#c9705c"),
}
MAX_ENTRIES = sum(name.startswith("entry") for name in PALETTE)
LIGHT = {name: light for name, (light, _) in PALETTE.items()}


def template(name: str) -> jinja2.Template:
    """Load one of our templates: everything put into it is escaped, and nothing may be missing."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "points": _change, "duration": _duration}
    environment.globals["palette"] = PALETTE
    return environment.get_template(name)


def write_file(out: Path, content: bytes) -> Path:
    """Write a file that is either whole or not there, and return where it lies.

    Raises:
        UserError: it cannot be written.
    """
    place = Path(os.path.realpath(out)) if os.path.islink(out) else out
    if not place.name:  # "." and "/"
        raise UserError(f"{out} is a folder; name a file with --out")
    unfinished = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        if place.exists() and not place.is_file():  # a device or a pipe is written to, never replaced
            place.write_bytes(content)
            return out
        unfinished.write_bytes(content)
        unfinished.replace(place)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}); name a file with --out") from None
    finally:
        with suppress(OSError):
            unfinished.unlink()
    return out


def _change(value: float | None, baseline: float | None) -> str:
    """Write a change in percentage points with its sign; empty where either is unknown."""
    return "" if value is None or baseline is None else points(value - baseline)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
