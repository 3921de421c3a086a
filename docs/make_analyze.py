"""Fill `docs/analyze.md` and draw its figures from committed rows: `python docs/make_analyze.py`.

The rows are in `docs/results/analyze`, one folder per case, as the commands of the page write them; with
`--measure` they are made anew, which needs the extra `kvloom[analyze]`. What stands between two markers
of the page is replaced; the words are ours.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from _pages import filled

from kvloom.evaluation import analysis_figures, manifold, spectrum
from kvloom.evaluation.manifold import Manifold

DOCS = Path(__file__).parent
PAGE = DOCS / "analyze.md"
RESULTS = DOCS / "results" / "analyze"
IMAGES = DOCS / "images"
SPREAD = "mp_kvm(window_size=64, similarity_threshold=0.95, min_merge_similarity=0.95)"
CLOSEST = "mp_kvm(window_size=64, similarity_threshold=0.95)"
COMMON = ["--layer", "3", "--device", "cpu", "--force"]
CASES = {
    "manifold": ["manifold", "--topics", "--recipe", SPREAD],
    "closest": ["manifold", "--topics", "--recipe", CLOSEST],
    "attention": ["attention", "--recipe", SPREAD],
}


def measure() -> None:
    """Run the commands; of each folder only row and data stay."""
    for name, command in CASES.items():
        out = RESULTS / name
        run = [sys.executable, "-m", "kvloom.cli.main", "analyze", *command, *COMMON]
        subprocess.run([*run, "--out", str(out)], check=True)
        for path in out.glob("*.png"):
            path.unlink()


def draw(folder: Path) -> None:
    """The page's figures, into a folder."""
    with tempfile.TemporaryDirectory() as made:
        analysis_figures.draw_manifold(*manifold.load(RESULTS / "manifold"), Path(made))
        analysis_figures.draw_attention(*spectrum.load(RESULTS / "attention"), Path(made))
        for path in Path(made).glob("*.png"):
            shutil.copy(path, folder / f"analyze_{path.name}")


def manifold_table() -> str:
    """Markdown: the case of the figures, and the one that merges the closest pair whatever its distance."""
    out = [
        "| recipe | tokens folded | largest centroid | purity | one centroid for all | shift at boundaries | "
        "within passages |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in ("manifold", "closest"):
        row, _ = manifold.load(RESULTS / name)
        out.append("| " + " | ".join(_manifold_cells(row)) + " |")
    return "\n".join(out)


def _manifold_cells(row: Manifold) -> list[str]:
    setting = row.setting
    folded = setting.left - setting.dropped
    parts = (row.purity, row.purity_of_one, row.shift, row.shift_within)
    shares = [f"{x:.1%}" for x in parts if x is not None]
    return [f"`{setting.subject.recipe}`", f"{folded}", f"{max(setting.masses):.0f}", *shares]


def attention_table() -> str:
    """Markdown: shares of attention, and how far they are from the full cache's."""
    e = spectrum.load(RESULTS / "attention")[0].energy
    return "\n".join(
        [
            "| | share of attention | mean difference to the full cache, query by query |",
            "| --- | ---: | ---: |",
            f"| centroids, with log mass | {e.with_mass:.1%} | {e.error_with:.1%} |",
            f"| centroids, without it | {e.without_mass:.1%} | {e.error_without:.1%} |",
            f"| their tokens, in a full cache | {e.full:.1%} | |",
        ]
    )


def tables() -> dict[str, str]:
    """The page's tables by name."""
    return {"manifold": manifold_table(), "attention": attention_table()}


def main() -> None:
    if "--measure" in sys.argv[1:]:
        measure()
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), tables()), encoding="utf-8")
    draw(IMAGES)


if __name__ == "__main__":
    main()
