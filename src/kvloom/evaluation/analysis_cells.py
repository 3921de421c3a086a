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
    compare,
    identity,
    manifold,
    projection,
    spectrum,
    topics,
)
from kvloom.evaluation.cells import Finished
from kvloom.evaluation.experiment import Spec
from kvloom.evaluation.subjects import spell_out

KEY_CHARACTERS = 16


def folder_of(folder: Path, kind: str, key: str) -> Path:
    """Where the results of an analysis lie."""
    return folder / kind / key[:KEY_CHARACTERS]


def work(spec: Spec, folder: Path, again: bool, progress: compare.Progress) -> Finished:
    """Analyse, unless it is done; wrong input is the cell's result."""
    try:
        case = _case(spec)
        key = _key(spec, case)
        place = folder_of(folder, spec.kind, key)
        if again or not place.exists():
            with torch.inference_mode():
                _write(spec, case, place)
        return Finished(key=key)
    except (ValueError, TypeError, OSError) as error:
        return Finished(failed=" ".join(str(error).split()))


def _case(spec: Spec) -> analysis.Case:
    o = spec.options
    model, tokenizer = compare.load_model(spec.model, spec.dtype, spec.device)
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
    return identity.cell_key(
        kind=spec.kind, model=identity.model_sha256(case.model), recipe=spell_out(case.recipe),
        budget=spec.budget, text=case.text.document.facts.sha256, options=spec.options,
        layer=case.layer,
        sources=[env.source_sha256, identity.foreign_sha256(case.recipe.policies)],
        versions=[env.python, env.torch, env.transformers],
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
