"""Our pages in a real browser, where there is one: every section, no error on the console, nothing from outside."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from analysis.compare import group_runs
from analysis.comparison import comparison
from analysis.page import PALETTE
from analysis.predictions import differences
from analysis.report import render
from analysis.runs import read_runs

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NASTY = "<script>document.title = 'run'</script>\"'&</style><img src=x onerror=\"document.title='run'\">"
# What a page looks like once it is laid out: its colours, and whether it can be pushed sideways.
LOOK = """<script>
document.querySelectorAll("details").forEach(one => one.open = true);
const wide = [...document.querySelectorAll("body *")].filter(one =>
  !one.closest(".scroll, svg, pre") && one.getBoundingClientRect().right > innerWidth + 1).map(one => one.outerHTML);
document.body.dataset.look = JSON.stringify({
  paper: getComputedStyle(document.body).backgroundColor, inner: innerWidth,
  wide: wide.map(text => text.slice(0, 99)), asked: performance.getEntriesByType("resource").map(one => one.name)});
</script>"""
PHONE = """<body><iframe style="width: {width}px; height: 900px; border: 0" srcdoc="{page}"></iframe><script>
onload = () => document.body.dataset.inner = document.querySelector("iframe").contentDocument.documentElement.outerHTML;
</script>"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


def opened(page, tmp_path, width=1400, dark=False):
    """Return the page as the browser has it after its scripts, and fail on what it says on the console."""
    path = tmp_path / "page.html"
    # A window has at least 500 pixels, a phone has fewer.
    path.write_text(PHONE.format(width=width, page=html.escape(page)) if width < 500 else page, encoding="utf-8")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--enable-logging=stderr",
        f"--window-size={width},900",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
    ]
    # Nothing may be looked up: a page that asks for something from outside says so on the console.
    flags += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [str(CHROMIUM), *flags, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120
    )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line or "ERR_" in line]
    assert console == []
    inner = re.search(r'data-inner="(.*?)"', done.stdout, flags=re.S)
    dom = html.unescape(inner[1]) if inner else done.stdout
    assert "<title>run</title>" not in dom
    return dom


def look_of(dom):
    return json.loads(html.unescape(re.search(r'data-look="(.*?)"', dom)[1]))


@pytest.fixture
def runs(digits, make_run):
    """CE, a method with a hostile name, and a second stage: on a dataset that is there, with hostile classes."""
    split = digits.splits["test"]
    ids_N = np.argsort(split.samples["label"], kind="stable")
    kept = {"predictions": True, "diagnostics": True, "test_ids": ids_N, "data": str(digits.root)}
    kept |= {"train_counts": digits.train_counts.tolist(), "test_counts": split.class_counts.tolist()}
    classes = [f"{NASTY}{j}" for j in range(10)]
    manifest = digits.root / "dataset.json"
    content = manifest.read_text()
    manifest.write_text(json.dumps(json.loads(content) | {"classes": classes}))
    titles = {"CE": (0.2, {}), NASTY: (0.9, {}), "BBN + AFG": (0.6, {"stage": 2, "from": "1"})}
    yield read_runs(
        [
            make_run(str(i), title=title, recall=recall, dataset=NASTY, classes=classes, **kept, **more)
            for i, (title, (recall, more)) in enumerate(titles.items())
        ]
    )
    manifest.write_text(content)


@pytest.mark.parametrize(("width", "dark"), [(1400, False), (390, True), (390, False), (1400, True)])
def test_the_report_in_a_browser(runs, tmp_path, width, dark):
    dom = opened(render(runs).replace("</body>", LOOK + "</body>"), tmp_path, width, dark)
    sections = [re.sub(r"<.*?>", "", heading) for heading in re.findall(r"<h3>(.*?)</h3>", dom)]
    assert sections == [
        "Accuracy",
        "Confidence intervals",
        "Head, middle and tail",
        "Worst mistakes in the tail",
        "Confusion",
        "Calibration",
        "The data",
        "Training",
        "Classifier and features",
        "Generated features",
        "Runs",
    ]
    look = look_of(dom)
    assert look["inner"] == width
    assert look["wide"] == []
    assert {name.split(":")[0] for name in look["asked"]} <= {"data"}
    red, green, blue = (int(PALETTE["paper"][dark][i : i + 2], 16) for i in (1, 3, 5))
    assert look["paper"] == f"rgb({red}, {green}, {blue})"


@pytest.mark.parametrize(("width", "dark"), [(1400, False), (390, True)])
def test_the_comparison_sorts_in_a_browser(runs, tmp_path, width, dark):
    entries = group_runs(runs)
    page = comparison(entries, differences(entries)[0])
    click = "<script>document.querySelectorAll('button.sort')[3].click()</script>"  # few, twice: the lowest first
    dom = opened(page.replace("</body>", 2 * click + LOOK + "</body>"), tmp_path, width, dark)
    rows = re.findall(r"<tr>\s*<td>(.*?)</td>", dom.replace("\n", ""))
    assert [row[:3] for row in rows] == ["CE", "BBN", "&lt"]
    assert look_of(dom)["wide"] == []
