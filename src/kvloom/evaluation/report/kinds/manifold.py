"""Keys of one head before and after partition: the figures of `kvloom analyze manifold`."""

from __future__ import annotations

from kvloom.evaluation import analysis_figures, manifold
from kvloom.evaluation.report.blocks import Block, Note, Picture
from kvloom.evaluation.report.data import Data

OPTIONS: dict[str, str] = {}
TOGETHER = True


def make(data: Data) -> list[Block]:
    """Two figures per analysis with topics, one without. Raises Missing if the folder holds none."""
    blocks: list[Block] = []
    for number, folder in enumerate(data.analyses(manifold.NAME), 1):
        row, tensors = manifold.load(folder)
        keys = analysis_figures.planes(row, tensors)
        blocks.append(Picture(keys, "keys before and after partition", str(number)))
        if row.topics:
            steps = analysis_figures.topic_transitions(row, tensors)
            blocks.append(
                Picture(steps, "the nearest centroid along the text", f"{number} transitions")
            )
        blocks.append(
            Note(
                f"{row.setting.subject.recipe}: {len(row.setting.masses)} centroids, {row.setting.exact} exact keys; "
                f"mean cosine of folded keys to their nearest centroid {row.similarity:.3f}."
            )
        )
    return blocks
