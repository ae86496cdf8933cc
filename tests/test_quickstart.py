"""README's picture and sentence say what the kept results of scripts/quickstart.sh say."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
KEPT = json.loads((ROOT / "analysis/results/quickstart.json").read_text())
README = (ROOT / "README.md").read_text()


def shown(entry: dict, key: str) -> str:
    return f"{100 * entry['mean'][key]:.1f}"


def test_the_picture_has_the_kept_figures():
    picture = (ROOT / "analysis/results/quickstart.svg").read_text()
    texts = [text.strip() for text in re.findall(r"<text[^>]*>([^<]*)", picture)]
    assert {entry["title"] for entry in KEPT} <= set(texts)
    wanted = sorted(shown(entry, key) for entry in KEPT for key in ("top1", "many", "few"))
    figures = sorted(f"{float(text):.1f}" for text in texts if re.fullmatch(r"\d+(\.\d)?", text))
    assert figures == wanted
    assert "(analysis/results/quickstart.svg)" in README


def test_the_sentence_has_the_kept_figures():
    first, *_, last = KEPT
    (sentence,) = re.findall(r"of the rare classes' images (.*?)\.\s", README.replace("\n", " "))
    assert re.findall(r"\d+\.\d", sentence) == [
        f"{100 * entry[of]['few']:.1f}" for entry in (first, last) for of in ("mean", "std")
    ]


def test_the_gain_in_the_tail_is_more_than_twice_the_spread():
    first, *_, last = KEPT
    assert first["n"] == last["n"] >= 2
    gain = last["mean"]["few"] - first["mean"]["few"]
    assert gain > 2 * max(first["std"]["few"], last["std"]["few"])
    assert last["vs_first"]["balanced_accuracy"]["low"] > 0
