"""iNaturalist in its official layout: a JSON file per split in the style of COCO, beside the images.

    inat2018/train2018.json      {"images":      [{"id": 0, "file_name": "train_val2018/Aves/2761/….jpg", …}, …],
    inat2018/val2018.json         "annotations": [{"image_id": 0, "category_id": 2761, …}, …],
    inat2018/train_val2018/…      "categories":  [{"id": 2761, "name": …, …}, …], …}

Papers report on the official validation images, so these become the test split; nothing is held out of the
training images for selection unless it is asked for. Labels count the training file's categories by id.
"""

import json
from pathlib import Path
from typing import Any

from shards.errors import UserError
from shards.sources.files import check_folder, listed_source, read_text, some
from shards.sources.source import Source

FILES = {
    "inat2017": {"train": "train2017.json", "test": "val2017.json"},
    "inat2018": {"train": "train2018.json", "test": "val2018.json"},
    "inat2019": {"train": "train2019.json", "test": "val2019.json"},
    "inat2021": {"train": "train.json", "test": "val.json"},
}
# The newer collections are trained like the one of 2018.
PRESETS = {"inat2017": "inat2017"}
KEYS: dict[str, dict[str, type]] = {
    "images": {"id": int, "file_name": str},
    "annotations": {"image_id": int, "category_id": int},
}
KEYS_OF_CATEGORIES: dict[str, dict[str, type]] = {"categories": {"id": int, "name": str}}


def open_source(dataset: str, path: Path | None) -> Source:
    """List a collection of iNaturalist.

    Args:
        dataset: a key of `FILES`.
        path: the folder that holds the JSON files; the images lie below it at their file_name.

    Raises:
        UserError: a file that is missing or does not hold what it should, or images that are not there.
    """
    files = FILES[dataset]
    root = check_folder(dataset, path, f"the folder that holds {' and '.join(files.values())} and the images")
    for file in files.values():
        if not (root / file).is_file():
            raise UserError(
                f"{root / file} is missing; give --source the folder that holds {' and '.join(files.values())}"
            )
    skipped: list[str] = []
    category_ids: list[int] = []
    classes: list[str] = []
    lists = {}
    for split, file in files.items():
        keys = KEYS | KEYS_OF_CATEGORIES if split == "train" else KEYS
        columns = _columns(root / file, keys)
        if split == "train":
            names = dict(zip(_unique(root / file, "categories", columns), columns["categories"]["name"], strict=True))
            category_ids = sorted(names)
            classes = [names[i] for i in category_ids]
        label_of = {category: label for label, category in enumerate(category_ids)}
        lists[split] = _join(root / file, columns, label_of, skipped)
    return listed_source(
        root, lists, classes, skipped=skipped, preset=PRESETS.get(dataset, "inat2018"), val_fraction=0.0
    )


def _join(
    path: Path, columns: dict[str, dict[str, list[Any]]], label_of: dict[int, int], skipped: list[str]
) -> tuple[list[str], list[int]]:
    """Bring annotations and images together: names and labels."""
    file_of = dict(zip(_unique(path, "images", columns), columns["images"]["file_name"], strict=True))
    names = []
    labels = []
    lost = []
    annotated = set()
    annotations = columns["annotations"]
    for image, category in zip(annotations["image_id"], annotations["category_id"], strict=True):
        if category not in label_of:
            raise UserError(f"{path}: image {image} is of category {category}, which the training file does not list")
        annotated.add(image)
        if image not in file_of:
            lost.append(str(image))
            continue
        names.append(file_of[image])
        labels.append(label_of[category])
    if lost:
        skipped.append(f"annotations of images that {path.name} does not list are left out: {some(lost)}")
    if bare := [name for image, name in file_of.items() if image not in annotated]:
        skipped.append(f"images without an annotation in {path.name} are left out: {some(bare)}")
    return names, labels


def _columns(path: Path, keys: dict[str, dict[str, type]]) -> dict[str, dict[str, list[Any]]]:
    """Read each table's wanted keys: {"images": {"id": [0, 1, …], …}, …}."""
    wanted = {key for columns in keys.values() for key in columns}

    def slim(row: dict[str, Any]) -> dict[str, Any]:
        # What else the files tell of half a million images (licences, places, dates) is never kept in memory.
        return row if keys.keys() & row.keys() else {key: row[key] for key in wanted & row.keys()}

    try:
        content = json.loads(read_text(path), object_hook=slim)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); fetch it again") from None
    found: dict[str, dict[str, list[Any]]] = {}
    for table, columns in keys.items():
        if not isinstance(content, dict) or not isinstance(content.get(table), list):
            raise UserError(f"{path} lacks the key {table!r} with a list; is it the official file?")
        found[table] = {key: _column(path, content[table], table, key, kind) for key, kind in columns.items()}
    return found


def _column(path: Path, rows: list[Any], table: str, key: str, kind: type) -> list[Any]:
    try:
        values = [row[key] for row in rows]
    except (KeyError, TypeError):
        at = next(i for i, row in enumerate(rows) if not isinstance(row, dict) or key not in row)
        raise UserError(f"{path}: entry {at} of {table!r} lacks the key {key!r}") from None
    for at, value in enumerate(values):
        if type(value) is not kind:
            wanted = "a whole number" if kind is int else "text"
            raise UserError(f"{path}: entry {at} of {table!r} has the {key} {value!r}, which is not {wanted}")
    return values


def _unique(path: Path, table: str, columns: dict[str, dict[str, list[Any]]]) -> list[int]:
    ids: list[int] = columns[table]["id"]
    seen: set[int] = set()
    for i in ids:
        if i in seen:
            raise UserError(f"{path}: two of the {table} have the id {i}")
        seen.add(i)
    return ids
