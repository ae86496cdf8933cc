"""Our pages in a real browser, where there is one: every section, no error on the console, nothing from outside."""

import re
import shutil
import subprocess

import pytest

from analysis.compare import group_runs
from analysis.predictions import differences
from analysis.report import write_report
from analysis.runs import read_runs
from analysis.tables import blocks, html

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NASTY = "<script>document.title = 'run'</script>\"'&"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


def opened(path, tmp_path):
    """Return the page as the browser has it after its scripts, and fail on what it says on the console."""
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--enable-logging=stderr",
    ]
    # Nothing may be looked up: a page that asks for something from outside says so on the console.
    flags += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [str(CHROMIUM), *flags, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120
    )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line or "ERR_" in line]
    assert console == []
    return done.stdout


@pytest.fixture
def runs(make_run):
    titles = {"CE": 0.2, NASTY: 0.9, "BBN + AFG": 0.6}
    classes = [f"{NASTY}{j}" for j in range(6)]
    return read_runs(
        [
            make_run(str(i), title=title, recall=recall, dataset=NASTY, classes=classes, predictions=True)
            for i, (title, recall) in enumerate(titles.items())
        ]
    )


def test_the_report_in_a_browser(runs, tmp_path):
    page = opened(write_report(runs, tmp_path / "report.html"), tmp_path)
    sections = [re.sub(r"<.*?>", "", heading) for heading in re.findall(r"<h3>(.*?)</h3>", page)]
    assert sections == [
        "Accuracy",
        "Confidence intervals",
        "Head, middle and tail",
        "Confusion",
        "Calibration",
        "The data",
        "Training",
        "Runs",
    ]
    assert "<title>run</title>" not in page
    assert "<script" not in page


def test_the_comparison_sorts_in_a_browser(runs, tmp_path):
    entries = group_runs(runs)
    page = html(blocks(entries, versus=differences(entries)[0]))
    click = "<script>document.querySelectorAll('button.sort')[3].click()</script>"  # few, twice: the lowest first
    path = tmp_path / "compare.html"
    path.write_text(page.replace("</body>", 2 * click + "</body>"), encoding="utf-8")
    found = opened(path, tmp_path)
    assert "<title>run</title>" not in found
    rows = re.findall(r"<tr><td>(.*?)</td>", found.replace("\n", ""))
    assert [row[:3] for row in rows] == ["CE", "BBN", "&lt"]
