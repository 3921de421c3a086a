"""The page in a browser: no errors, images that can be seen, links that lead to rows and open them.

Skipped where Chromium is not installed (Debian: chromium).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from kvloom.evaluation.experiment import Figure
from kvloom.evaluation.report import build
from tests.evaluation.report import made

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--enable-logging=stderr", "--v=0",
)  # fmt: skip
# Runs beside the page's own script, which the page's policy allows, and writes what it saw into the page.
PROBE = """<script>
const seen = {errors: []};
addEventListener("error", (e) => seen.errors.push(String(e.message)));
addEventListener("securitypolicyviolation", (e) => seen.errors.push(e.violatedDirective));
addEventListener("load", async () => {
  seen.widths = [...document.images].map((x) => x.naturalWidth);
  seen.broken = [...document.querySelectorAll("a")].filter((a) =>
    !document.getElementById(a.hash.slice(1))).length;
  const heads = [...document.querySelectorAll("th.sorts.number")], column = heads[0];
  const values = () => [...column.closest("table").tBodies[0].rows]
    .map((r) => r.cells[column.cellIndex].dataset.value).filter((v) => v !== undefined).map(Number);
  column.click(); seen.up = values();
  column.click(); seen.down = values();
  const several = document.querySelector("a[data-rows]");
  several.click();
  await new Promise((done) => setTimeout(done, 100));
  seen.asked = several.dataset.rows.split(" ").length;
  seen.open = [...document.querySelectorAll("details.row[open]")].map((x) => x.id);
  const line = document.createElement("pre");
  line.id = "seen"; line.textContent = JSON.stringify(seen); document.body.append(line);
});
</script>"""


def browse(page: Path, profile: Path) -> tuple[dict[str, Any], str]:
    """What the probe saw, and what the browser logged of the page."""
    text = page.read_text(encoding="utf-8")
    probed = page.with_name("probed.html")
    probed.write_text(text.replace("<style>", PROBE + "<style>", 1), encoding="utf-8")
    assert CHROMIUM is not None
    done = subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "--virtual-time-budget=10000", "--dump-dom", probed.as_uri()],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stderr
    seen: dict[str, Any] = json.loads(unescape(found[1]))
    return seen, "\n".join(x for x in done.stderr.splitlines() if "CONSOLE" in x)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    root = tmp_path_factory.mktemp("browser")
    figures = [f for f in made.FIGURES if f.kind in ("table", "pareto", "needles", "ablation")]
    outcomes = [*made.main_grid(), *made.needle_grid()]
    folder = made.write(made.experiment(outcomes, figures=figures), root / "rows")
    return browse(build.build([folder], root / "out").page, root / "profile")


def test_there_are_no_errors(seen: tuple[dict[str, Any], str]) -> None:
    assert seen[0]["errors"] == [] and seen[1] == ""


def test_every_image_is_seen(seen: tuple[dict[str, Any], str]) -> None:
    widths = seen[0]["widths"]
    assert len(widths) == 3 and min(widths) > 300


def test_every_link_has_a_target(seen: tuple[dict[str, Any], str]) -> None:
    assert seen[0]["broken"] == 0


def test_a_click_on_a_head_sorts(seen: tuple[dict[str, Any], str]) -> None:
    up, down = seen[0]["up"], seen[0]["down"]
    assert up == sorted(up) and down == sorted(down, reverse=True) and len(set(up)) > 1


def test_a_number_opens_all_its_rows(seen: tuple[dict[str, Any], str]) -> None:
    assert seen[0]["asked"] > 1 and len(seen[0]["open"]) == seen[0]["asked"]


def test_the_browser_would_have_told(tmp_path: Path) -> None:
    figures = [Figure("table", "T", "main", {"columns": ["kl"]})]
    folder = made.write(made.experiment(made.main_grid(), figures=figures), tmp_path / "rows")
    page = build.build([folder], tmp_path / "out").page
    broken = page.read_text(encoding="utf-8").replace(
        '"use strict";', '"use strict"; fetch("https://example.invalid/x").catch(() => 0); setTimeout(() => nothing());'
    )  # fmt: skip
    page.write_text(broken, encoding="utf-8")
    found, console = browse(page, tmp_path / "profile")
    assert any("nothing is not defined" in e for e in found["errors"])
    assert "connect-src" in console or "default-src" in console
