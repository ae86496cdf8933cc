"""The house keeps its order: who may import whom, and names that shadow nothing."""

import ast
import importlib.metadata
import re
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
# Inside train/: launchable files stand on features, these on the engine, this on networks. Nothing reaches back.
TRAIN_ORDER = ("networks", "engine", "features")


class WithoutTypeChecking(ast.NodeTransformer):
    """Drops what is imported for the type check alone: it is not there when the program runs."""

    def visit_If(self, node: ast.If) -> ast.If | None:
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else node


def imported_modules(path: Path, when_it_runs: bool = False) -> set[str]:
    found = set()
    tree: ast.AST = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(WithoutTypeChecking().visit(tree) if when_it_runs else tree):
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


@pytest.mark.parametrize("path", sorted((ROOT / "train").rglob("*.py")), ids=str)
def test_rooms_of_train_stand_on_each_other(path):
    room = path.relative_to(ROOT / "train").parts[0]
    below = TRAIN_ORDER if room.endswith(".py") else TRAIN_ORDER[: TRAIN_ORDER.index(room) + 1]
    for module in imported_modules(path):
        parts = module.split(".")
        if parts[0] == "train" and path.name != "__init__.py":
            allowed = len(parts) > 1 and (parts[1] in below or (room.endswith(".py") and len(parts) == 2))
            assert allowed, f"{path} imports {module}"


def test_no_module_imports_itself_over_others():
    files = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}
    needs = {name: imported_modules(path, when_it_runs=True) & names.keys() for name, path in names.items()}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above, name])
        if name not in done:
            for other in sorted(needs[name]):
                visit(other, (*above, name))
            done.add(name)

    for name in names:
        visit(name, ())


def test_train_shows_launchable_files_first():
    entries = {path.name for path in (ROOT / "train").iterdir()} - {"README.md", "__init__.py", "__pycache__"}
    launchable = {path.name for path in (ROOT / "train").glob("*.py") if '__name__ == "__main__"' in path.read_text()}
    assert entries == launchable | {"presets", *TRAIN_ORDER}


@pytest.mark.parametrize("room", ROOMS)
def test_no_file_is_too_long_to_read(room):
    for path in (ROOT / room).rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 360, path


def test_nothing_in_train_shadows_a_module():
    # A launched script has its own folder first on sys.path.
    installed = {name for name in importlib.metadata.packages_distributions() if name not in ROOMS}
    for path in (ROOT / "train").iterdir():
        if path.suffix in ("", ".py"):
            assert path.stem not in sys.stdlib_module_names | installed, f"{path} would shadow the module {path.stem}"


def test_nothing_tracked_is_large():
    skipped = {".git", ".venv", "data", "runs", ".mypy_cache", ".ruff_cache"}
    for path in ROOT.rglob("*"):
        if path.is_file() and not skipped & set(path.relative_to(ROOT).parts):
            assert path.stat().st_size < 1_000_000, path


def listed_files(readme: Path, title: str) -> set[str]:
    """Return the names of a README's tree, folders with a slash behind them."""
    (lines,) = re.findall(
        rf"^## {title}\n\n```\n(.*?)\n```$", readme.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    listed, folders = set(), {-1: ""}
    for line in lines.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 4, line.split()[0]
        assert folders[depth - 1] + name not in listed, f"{readme}: {name} is there twice"
        listed.add(folders[depth - 1] + name)
        folders[depth] = folders[depth - 1] + name
    return listed


def files_in(folder: Path, prefix: str = "") -> set[str]:
    unnamed = {"__init__.py", "__main__.py", "__pycache__"}
    entries = [
        path for path in folder.iterdir() if path.name not in unnamed and path.suffix in ("", ".py", ".sh", ".yaml")
    ]
    return {f"{prefix}{path.name}" + "/" * path.is_dir() for path in entries}


def test_the_readme_has_the_rooms():
    assert listed_files(ROOT / "README.md", "The house") == {f"{room}/" for room in (*ROOMS, "scripts", "tests")}


@pytest.mark.parametrize("room", [*ROOMS, "scripts", "tests"])
def test_a_rooms_readme_has_its_files(room):
    found = files_in(ROOT / room)
    for inner in TRAIN_ORDER if room == "train" else ():
        found |= files_in(ROOT / room / inner, f"{inner}/")
    assert listed_files(ROOT / room / "README.md", "Files") == found
