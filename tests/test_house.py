"""The house keeps its order: who may import whom, and names that shadow nothing."""

import ast
import importlib.metadata
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "shards": {"shards"},
    "pipeline": {"shards", "pipeline"},
    "train": {"shards", "pipeline", "train", "analysis.metrics"},
    "analysis": {"shards", "analysis"},
}
ROOMS = tuple(MAY_IMPORT)


def imported_modules(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where a line belongs"
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("path", sorted(p for room in ROOMS for p in (ROOT / room).rglob("*.py")), ids=str)
def test_rooms_import_only_what_they_may(path):
    room = path.relative_to(ROOT).parts[0]
    for module in imported_modules(path):
        if module.split(".")[0] in ROOMS:
            allowed = MAY_IMPORT[room]
            assert module in allowed or module.split(".")[0] in allowed, f"{path} imports {module}"


def test_no_file_in_train_shadows_a_module():
    # A launched script has its own folder first on sys.path.
    installed = {name for name in importlib.metadata.packages_distributions() if name not in ROOMS}
    for path in (ROOT / "train").glob("*.py"):
        assert path.stem not in sys.stdlib_module_names | installed, f"{path} would shadow the module {path.stem}"


def test_nothing_tracked_is_large():
    skipped = {".git", ".venv", "data", "runs", ".mypy_cache", ".ruff_cache"}
    for path in ROOT.rglob("*"):
        if path.is_file() and not skipped & set(path.relative_to(ROOT).parts):
            assert path.stat().st_size < 1_000_000, path


def test_the_readmes_file_tree_is_the_disks():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = text.split("## The house\n\n```\n")[1].split("\n```")[0].splitlines()
    told, room = set(), ""
    for line in lines:
        name = line.split()[0]
        room = "" if not line.startswith(" ") else room
        told.add(room + name)
        room = room or name
    unnamed = {"__init__.py", "__main__.py", "__pycache__"}
    found = {f"{room}/" for room in (*ROOMS, "scripts", "tests")}
    for room in (*ROOMS, "scripts"):
        for path in (ROOT / room).iterdir():
            if path.name not in unnamed and path.suffix in ("", ".py", ".sh"):
                found.add(f"{room}/{path.name}" + "/" * path.is_dir())
    assert told == found
