"""Attention that centroids get with and without their mass: the figure of `kvloom analyze attention`."""

from __future__ import annotations

from kvloom.evaluation import analysis_figures, spectrum
from kvloom.evaluation.report.blocks import Block, Note, Picture
from kvloom.evaluation.report.data import Data

OPTIONS: dict[str, str] = {}
TOGETHER = True


def make(data: Data) -> list[Block]:
    """One figure per analysis in the folder. Raises Missing if it holds none."""
    blocks: list[Block] = []
    for number, folder in enumerate(data.analyses(spectrum.NAME), 1):
        row, tensors = spectrum.load(folder)
        e = row.energy
        blocks += [
            Picture(analysis_figures.energy(row, tensors), "attention to centroids", str(number)),
            Note(
                f"{row.setting.subject.recipe}: centroids get {e.with_mass:.1%} of the attention with the log of "
                f"their mass, {e.without_mass:.1%} without; their tokens in a full cache {e.full:.1%}."
            ),
        ]
    return blocks
