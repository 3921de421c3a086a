"""Cells that look into one head: keys before and after partition (`manifold`), `attention`.

Each has its own folder, `FOLDER/KIND/KEY`, with row and tensors; it is made under another name and
renamed when it is whole.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from kvloom.evaluation import (
    analysis,
    analysis_rows,
    identity,
    manifold,
    projection,
    spectrum,
    topics,
)
from kvloom.evaluation.cells import Finished, Workplace, guarded
from kvloom.evaluation.experiment import Spec
from kvloom.evaluation.subjects import Cell

KEY_CHARACTERS = 16


def folder_of(folder: Path, kind: str, key: str) -> Path:
    """Where the results of an analysis lie."""
    return folder / kind / key[:KEY_CHARACTERS]


class Analyst:
    """Analyses cells one after the other, keeping the model."""

    def __init__(self, folder: Path, again: bool):
        self.folder, self.again, self.place = folder, again, Workplace()

    def work(self, spec: Spec) -> Finished:
        """Analyse, unless it is done; what goes wrong is the cell's result."""
        return guarded(lambda: self._analyse(spec), self.place.forget)

    def _analyse(self, spec: Spec) -> Finished:
        with self.place.threads(spec):
            case = _case(spec, *self.place.model_of(spec)[:2])
            key = _key(spec, case)
            place = folder_of(self.folder, spec.kind, key)
            if self.again or not place.exists():
                with torch.inference_mode():
                    _write(spec, case, place)
            return Finished(key=key)


def _case(spec: Spec, model: Any, tokenizer: Any) -> analysis.Case:
    o = spec.options
    assert spec.text is not None
    if o.get("topics"):
        names = topics.SYNTHETIC if spec.synthetic else tuple(topics.SOURCES)
        text = topics.alternate(names, tokenizer, o["length"], o["passage"])
    else:
        text = topics.plain(spec.text, tokenizer, o["length"])
    layer = None if o["layer"] < 0 else o["layer"]
    return analysis.prepare(
        model, spec.model, spec.recipe, spec.budget, text, layer, o["head"], o["chunk"]
    )


def _key(spec: Spec, case: analysis.Case) -> str:
    env = identity.environment(case.model.device)
    cell = Cell(case.recipe, case.budget)
    return identity.cell_key(
        kind=spec.kind, model=identity.model_sha256(case.model), options=spec.options,
        text=case.text.document.facts.sha256, layer=case.layer,
        projections=[projection.available(), *map(identity.installed, ("scikit-learn", "umap-learn"))],
        **cell.parts(env),
    )  # fmt: skip


def _write(spec: Spec, case: analysis.Case, place: Path) -> None:
    part = place.with_name(f".{place.name}.{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    row: Any
    if spec.kind == "manifold":
        row, tensors = manifold.analyze(case, projection.available())
        analysis_rows.save(row, tensors, part, manifold.NAME)
    else:
        row, tensors = spectrum.analyze(case)
        analysis_rows.save(row, tensors, part, spectrum.NAME)
    shutil.rmtree(place, ignore_errors=True)
    os.replace(part, place)
