from __future__ import annotations

import dataclasses
import itertools
import random
import statistics as stdlib
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure as Drawn
from matplotlib.text import Text as Drawn_text

from kvloom.evaluation.experiment import Claim, Experiment, Figure, Outcome
from kvloom.evaluation.metrics import METRICS
from kvloom.evaluation.report import build, curves, data, equality, kinds
from kvloom.evaluation.report.blocks import Block, Note, Picture, Table
from kvloom.evaluation.report.data import Cell, Data, Missing
from kvloom.evaluation.results import Subject
from kvloom.evaluation.statistics import Summary
from tests.evaluation.report import made


def make(kind: str, grid: str | None = None, experiment: Experiment | None = None, **options: Any) -> list[Block]:  # fmt: skip
    figure = Figure(kind, "a title", grid, options)
    found = Data.of(experiment or made.experiment(), figure, Path("nowhere"))
    blocks: list[Block] = kinds.check(figure).make(found)
    return blocks


def table(blocks: list[Block]) -> list[dict[str, Any]]:
    (found,) = [b for b in blocks if isinstance(b, Table)]
    return [dict(zip(found.columns, row, strict=True)) for row in found.rows]


def figure(blocks: list[Block]) -> Drawn:
    return next(b.figure for b in blocks if isinstance(b, Picture))


def notes(blocks: list[Block]) -> str:
    return "\n".join(b.text for b in blocks if isinstance(b, Note))


# -- cells ---------------------------------------------------------------------------------------


def test_repeats_are_one_cell_and_budgets_are_not() -> None:
    found = Data.of(made.experiment(), Figure("table", "", "main"), Path()).cells()
    own = [c for c in found if c.changes]  # what fell back is a cell of its own
    assert len(found) == 1 + 3 * 3 + 1 and [len(c.outcomes) for c in own] == [1]
    assert sorted(len(c.outcomes) for c in found) == [1, 2, *[3] * 9]


def test_the_seed_of_a_repeat_does_not_tell_recipes_or_tasks_apart() -> None:
    outcomes = [
        made.document(f"random(seed={seed})" if seed else "random", "25%", spec={"seed": seed})
        for seed in range(3)
    ]
    found = Data.of(made.experiment(outcomes), Figure("table", ""), Path()).cells()
    assert [(c.name, len(c.outcomes)) for c in found] == [("random", 3)]
    assert data.unseeded("needle(length=5, seed=3)", 3) == "needle(length=5)"
    assert data.unseeded("needle(seed=3, length=5)", 3) == "needle(length=5)"
    assert data.unseeded("random(seed=13)", 3) == "random(seed=13)"


def test_a_row_that_several_grids_share_counts_once() -> None:
    one = made.document("snapkv", "25%", 0.1, 0.25)
    shared = dataclasses.replace(one, spec=made.spec("snapkv", "25%", grid="other"))
    named = dataclasses.replace(one, spec=made.spec("snapkv", "25%", name="ours"))
    found = Data.of(made.experiment([one, shared, named]), Figure("table", ""), Path()).subjects()
    assert [(c.name, len(c.rows)) for c in found] == [("snapkv", 1), ("ours", 1)]


def test_a_score_has_the_interval_of_its_examples_and_the_deviation_of_its_repeats() -> None:
    scores = [{0.5: [1.0, 0.0, 1.0, 1.0]}, {0.5: [0.0, 0.0, 1.0, 0.0]}]
    outcomes = [
        made.task("snapkv", "25%", 512, s, 0.25, seed=i, repeat=i) for i, s in enumerate(scores)
    ]
    (cell,) = Data.of(made.experiment(outcomes), Figure("table", ""), Path()).cells()
    found = cell.summary("score")
    assert found is not None and found.mean == 0.5 and found.count == 2
    assert found.deviation == pytest.approx(stdlib.stdev([0.75, 0.25]))
    assert found.low is not None and 0 < found.low < 0.5  # two repeats alone would say 0.25
    single = Cell(cell.spec, cell.outcomes[:1]).summary("score")
    assert single is not None and single.low is not None and single.deviation is None


def test_parameters_are_found_by_name_and_ambiguity_is_named() -> None:
    spec = made.spec(
        "streaming_llm(recent=60) | lazy(every=16) | int4", "25%", options={"tokens": 9}
    )
    assert data.parameter(spec, "every") == 16 and data.parameter(spec, "lazy.slack") == 0
    assert data.parameter(spec, "budget") == "25%" and data.parameter(spec, "tokens") == 9
    assert data.parameter(spec, "nothing") is None
    assert data.parameter(made.spec("none"), "every") is None
    assert data.parameter(made.spec("recompute(window=9, positions=5)"), "window") == 9
    both = made.spec("h2o(recent=0.5) | mp_kvm(sinks=0)")
    names = data.full_names(data.parameters(both), "sinks")
    assert len(names) == 2
    with pytest.raises(ValueError, match=r"which one, h2o.sinks, mp_kvm.sinks"):
        data.parameter(both, "sinks")


# -- what ran otherwise than asked ---------------------------------------------------------------


def fell_back(**fallback: Any) -> list[Outcome]:
    """Two recipes on two texts; one of them ran otherwise on the second."""
    found = [
        made.document(recipe, None, harm + (text == "b"), 0.5, spec={"text": text}, text={"name": text, "sha256": text})
        for text in ("a", "b")
        for recipe, harm in (("none", 0.0), ("snapkv", 0.1), ("streaming_llm(recent=60)", 0.2))
    ]  # fmt: skip
    found[4].fallback = fallback
    return found


@pytest.mark.parametrize(
    ("fallback", "words"),
    [
        ({"model": "org/tiny"}, "model tiny"), ({"prefill_chunk": 64}, "prefill_chunk 64"),
        ({"dtype": "bfloat16", "tokens": 9}, "dtype bfloat16, tokens 9"),
    ],
)  # fmt: skip
def test_what_ran_otherwise_is_averaged_with_nothing_else(
    fallback: dict[str, Any], words: str
) -> None:
    outcomes = fell_back(**fallback)
    blocks = make(
        "table", None, made.experiment(outcomes, claims=[]), columns=["kl"], fold=["text"]
    )
    shown = {r["recipe"].text: r[METRICS["kl"].label] for r in table(blocks)}
    own = f"*snapkv ({words})"
    assert list(shown) == ["none", "snapkv", "streaming_llm(recent=60)", own]
    assert shown["snapkv"].keys == (outcomes[1].key,) and shown[own].keys == (outcomes[4].key,)
    assert len(shown["none"].keys) == 2
    for cell in Data.of(made.experiment(outcomes), Figure("pareto", ""), Path()).subjects():
        assert len({data.changes(o) for o in cell.outcomes}) == 1
    parts = Data.of(made.experiment(outcomes), Figure("pareto", "X"), Path()).by_model()
    assert len(parts) == (1 if "prefill_chunk" in fallback else 2)


def test_a_fallback_without_effect_or_without_a_row_changes_no_cell() -> None:
    outcomes = fell_back(model="testbed")
    failed = Outcome(made.spec("h2o"), failed="out of memory", fallback={"model": "org/tiny"})
    found = Data.of(made.experiment([*outcomes, failed]), Figure("table", ""), Path()).cells(["text"])  # fmt: skip
    assert [c.name for c in found] == ["none", "snapkv", "streaming_llm(recent=60)", "h2o"]
    assert found[-1].spec.model == "testbed"


@pytest.mark.parametrize("figure_", made.FIGURES, ids=lambda f: f.kind)
def test_every_figure_names_what_ran_otherwise_and_explains_the_mark(figure_: Figure) -> None:
    if figure_.kind in ("energy", "needles"):
        pytest.skip("no documents")
    experiment = made.experiment()
    last = [o for o in experiment.grid(figure_.grid) if o.row is not None][-1]
    last.fallback = {"prefill_chunk": 256}
    drawn = dataclasses.replace(experiment, figures=[figure_])
    (section,) = build.chapter(drawn, Path("nowhere")).sections
    assert not section.missing
    said = [e.text for t in section.blocks if isinstance(t, Table) for r in t.rows for e in r]
    said += [x.get_text() for b in section.blocks if isinstance(b, Picture) for x in b.figure.findobj(Drawn_text)]  # fmt: skip
    said.append(notes(list(section.blocks)))
    assert any("prefill_chunk 256" in x and "*" in x for x in said)
    assert notes(list(section.blocks)).count(data.MARKED) == (
        figure_.kind not in ("knorm", "ablation")  # which need one more cell that ran likewise
    )


def test_claims_of_another_model_are_not_beside_it() -> None:
    claim = Claim("snapkv", "kl", 0.5, "a paper")
    rows = table(make("table", None, made.experiment(fell_back(model="org/tiny"), claims=[claim]), fold=["text"]))  # fmt: skip
    said = {r["recipe"].text: r[METRICS["kl"].label + ", published"].text for r in rows}
    assert said["snapkv"] == "0.5000 [1]" and said["*snapkv (model tiny)"] == ""


# -- table ---------------------------------------------------------------------------------------


def test_a_table_has_the_mean_of_the_repeats_and_leads_to_their_rows() -> None:
    experiment = made.experiment()
    rows = table(make("table", "main", experiment, columns=["kl"]))
    for row in rows:
        same = [
            o for o in experiment.grid("main")
            if o.row and data.named(o) == row["recipe"].text and (o.spec.budget or "") == row["budget"].text
        ]  # fmt: skip
        values = [o.row.quality.kl for o in same]  # type: ignore[union-attr]
        entry = row[METRICS["kl"].label]
        assert entry.value == pytest.approx(stdlib.fmean(values))
        assert entry.keys == tuple(o.key for o in same)
        if len(values) > 1 and stdlib.stdev(values):
            assert f"± {stdlib.stdev(values):.4f}" in entry.text and entry.detail.startswith("[")
        else:
            assert "±" not in entry.text and entry.detail == ""


def test_claimed_and_measured_stand_side_by_side() -> None:
    blocks = make("table", "main", columns=["kl"])
    found = next(b for b in blocks if isinstance(b, Table))
    at = found.columns.index(
        METRICS["change"].label
    )  # published, so it is shown though not asked for
    assert found.columns[at + 1] == METRICS["change"].label + ", published"
    row = next(r for r in found.rows if r[0].text == "25%" and r[1].text == "snapkv")
    assert row[at].text.startswith("+10.40%") and row[at + 1].text == "+1.00% [2]"
    assert row[at + 1].keys == ()
    assert "[2] a paper, table 2, another model" in notes(blocks)
    others = [r for r in found.rows if r[1].text != "snapkv"]
    assert all(r[at + 1].text == "" for r in others)


def test_a_cell_without_rows_says_so() -> None:
    outcomes = [
        made.document("none"),
        Outcome(made.spec("h2o", "25%"), failed="out of memory"),
        Outcome(made.spec("tova", "25%")),
    ]
    rows = table(make("table", None, made.experiment(outcomes), columns=["kl"]))
    assert [r[METRICS["kl"].label].text for r in rows] == ["0.0000", "failed", "not measured"]


def test_what_cells_differ_in_has_a_column() -> None:
    outcomes = [made.document("none", spec={"text": t}) for t in ("a", "b")]
    experiment = made.experiment(outcomes)
    assert [r["text"].text for r in table(make("table", None, experiment))] == ["a", "b"]
    folded = table(make("table", None, experiment, fold=["text"]))
    assert len(folded) == 1 and "text" not in folded[0]


def test_names_stand_for_recipes() -> None:
    outcomes = [made.document("streaming_llm", spec={"name": "strict"})]
    claim = Claim("strict", "kl", 0.5, "a paper")
    rows = table(make("table", None, made.experiment(outcomes, claims=[claim]), columns=["kl"]))
    assert rows[0]["recipe"].text == "strict"
    assert rows[0][METRICS["kl"].label + ", published"].text == "0.5000 [1]"


def test_equal_bytes_are_stated_over_all_texts() -> None:
    said = notes(make("table", "main", columns=["kl"]))
    assert "25%: equal bytes, within 2% (on all 3 texts and tasks)." in said
    rows = made.rows_of(
        [made.document("a", "25%", share=0.25), made.document("b", "25%", share=0.2)]
    )
    assert any("NOT equal bytes" in s and "b -20%" in s for s in equality.statements(rows))
    tasks = [made.task(r, "25%", n, {0.5: [1.0]}, s) for r, s in (("a", 0.25), ("b", 0.2)) for n in (512, 1024)]  # fmt: skip
    said_of_tasks = equality.statements(made.rows_of(tasks))
    assert len(said_of_tasks) == 1 and "on all 2 texts and tasks" in said_of_tasks[0]


def test_equal_bytes_are_stated_where_recipes_have_sizes_of_their_own() -> None:
    sizes = (
        ("none", 1.0),
        ("int4", 0.25),
        ("streaming_llm(recent=250)", 0.2),
        ("h2o(recent=250)", 0.2),
    )
    rows = made.rows_of([made.document(r, share=s, subject=Subject(r, r, None, False, r[0] in "sh"), counts={"evicted": 2}) for r, s in sizes])  # fmt: skip
    same = "No budget, sizes of their own: equal bytes, within 2%."
    assert equality.statements(rows) == [same]
    rows += made.rows_of(
        [
            made.document(f"snapkv(recent={n})", share=0.2 - n / 100, counts={"evicted": 2})
            for n in range(4, 10)
        ]
    )
    (said,) = equality.statements(rows)
    assert said.startswith("No budget, sizes of their own: NOT equal bytes; against the largest: ")
    assert "snapkv(recent=9) -45%, snapkv(recent=8) -40%" in said and said.endswith("and 2 more.")
    assert (
        equality.statements(rows[:3]) == []
    )  # a full cache and a format have no size of their own


# -- quality against bytes -----------------------------------------------------------------------


def test_the_front_is_what_no_other_beats() -> None:
    draw = random.Random(3)
    for metric, worse in (("kl", 1), ("score", -1)):
        held = [_point(draw.randint(1, 9) / 10, draw.randint(0, 9) / 10) for _ in range(40)]
        found = {(p.x.mean, p.y.mean) for p in curves.front(held, metric)}
        by_hand = {
            (p.x.mean, p.y.mean)
            for p in held
            if not any(
                q.x.mean <= p.x.mean and worse * q.y.mean <= worse * p.y.mean
                and (q.x.mean, q.y.mean) != (p.x.mean, p.y.mean)
                for q in held
            )
        }  # fmt: skip
        assert found == by_hand


def _point(x: float, y: float) -> curves.Point:
    cell = Cell(made.spec("a"), ())
    return curves.Point(cell, Summary(x, None, None, None, 1), Summary(y, None, None, None, 1))


def test_pareto_draws_the_rows_and_marks_the_front() -> None:
    blocks = make("pareto", "main")
    axes = figure(blocks).axes[0]
    lines = {str(c.get_label()): c for c in axes.containers}
    xs = lines["snapkv"].lines[0].get_xdata()  # type: ignore[attr-defined]
    assert list(xs) == [0.125, 0.25, 0.5] and axes.get_xscale() == "log"
    assert "KL" in axes.get_ylabel() and "bytes retained" in axes.get_xlabel()
    front = {r["recipe"].text for r in table(blocks) if r["on the front"].text == "yes"}
    assert front == {"none", "snapkv | int4"}
    (step,) = [line for line in axes.lines if line.get_label() == "front"]
    assert list(step.get_xdata()) == [0.125, 0.25, 0.5, 1.0]


def test_retention_runs_from_everything_to_little() -> None:
    axes = figure(make("retention", "main", y="kl")).axes[0]
    assert axes.get_xlim()[0] > axes.get_xlim()[1] and axes.get_xscale() == "log"


def test_the_legend_is_outside_the_data() -> None:
    drawn = figure(make("pareto", "main"))
    drawn.canvas.draw_idle()
    drawn.draw_without_rendering()
    (legend,) = drawn.legends
    boxes = [axes.get_window_extent() for axes in drawn.axes]
    assert all(not box.overlaps(legend.get_window_extent()) for box in boxes)


# -- needles -------------------------------------------------------------------------------------


def test_needles_are_shown_by_length_and_depth() -> None:
    blocks = make("needles", "needles")
    panels = [a for a in figure(blocks).axes if a.images]
    titles = [a.get_title() for a in panels]
    assert titles == ["none (full cache)", "snapkv @ 25%", "streaming_llm @ 25%"]
    shares = panels[1].images[0].get_array()
    assert shares.shape == (5, 3)  # depths by lengths
    assert shares[:, 0].tolist() == [0.0, 0.0, 0.5, 0.5, 0.5]
    snapkv = table(blocks)[1]
    assert snapkv["512 tokens"].text == "30%" and snapkv["512 tokens"].detail == "3 of 10"
    assert len(snapkv["all"].keys) == 3 and "before the question was seen" in notes(blocks)


def test_a_field_without_examples_is_not_drawn_as_zero() -> None:
    outcomes = [
        made.task("none", None, 512, {0.0: [1.0]}, 1.0), made.task("none", None, 1024, {1.0: [0.0]}, 1.0),
    ]  # fmt: skip
    panel = figure(make("needles", None, made.experiment(outcomes))).axes[0]
    assert panel.images[0].get_array().mask.tolist() == [[False, True], [True, False]]  # type: ignore[union-attr]
    assert sorted(t.get_text() for t in panel.texts) == ["0%", "100%"]


# -- ablation and sweeps -------------------------------------------------------------------------


def test_an_ablation_is_paired_with_the_reference() -> None:
    blocks = make("ablation", "main", reference="streaming_llm", metric="kl")
    row = next(
        r for r in table(blocks) if r["recipe"].text == "snapkv" and r["budget"].text == "25%"
    )
    entry = row[f"difference in {METRICS['kl'].label}"]
    assert entry.value == pytest.approx(-0.2 * 1.04) and len(entry.keys) == 6
    assert "3 pairs" in entry.detail and entry.text == "-0.2080"


def test_an_ablation_pairs_answers_one_by_one() -> None:
    outcomes = [
        made.task("a", "25%", 512, {0.5: [1.0, 0.0, 1.0]}, 0.25),
        made.task("b", "25%", 512, {0.5: [0.0, 0.0, 1.0]}, 0.25),
    ]
    blocks = make("ablation", None, made.experiment(outcomes), reference="a", metric="score")
    (row,) = table(blocks)
    entry = row[f"difference in {METRICS['score'].label}"]
    assert entry.value == pytest.approx(-1 / 3) and "3 pairs" in entry.detail


def test_an_ablation_without_its_reference_is_missing() -> None:
    with pytest.raises(Missing, match="no cell of the reference 'h2o'"):
        make("ablation", "main", reference="h2o")


def test_a_sweep_has_a_line_for_whatever_else_differs() -> None:
    axes = figure(make("sweep", "sweep", parameter="every", metrics=["change", "tpot"])).axes
    lines = {str(c.get_label()): c.lines[0] for c in axes[0].containers}  # type: ignore[attr-defined]
    assert set(lines) == {"slack 0", "slack 16"}
    assert list(lines["slack 0"].get_xdata()) == [1.0, 16.0, 32.0, 64.0]
    assert list(lines["slack 16"].get_ydata()) == pytest.approx([0.0173, 0.0248, 0.0328, 0.0488])
    assert axes[0].get_xlabel() == "every" and axes[0].get_xscale() == "log"


def test_a_sweep_over_budgets_has_a_line_per_recipe() -> None:
    drawn = figure(make("sweep", "main", parameter="budget", metrics="kl"))
    assert [str(c.get_label()) for c in drawn.axes[0].containers] == [
        "streaming_llm",
        "snapkv",
        "snapkv | int4",
        "*snapkv | int4 (prefill_chunk 256)",
    ]


def test_a_sweep_needs_a_parameter_that_is_there() -> None:
    with pytest.raises(ValueError, match="parameter is required"):
        make("sweep", "sweep")
    with pytest.raises(Missing, match="no measured cell has a parameter 'sigma'"):
        make("sweep", "sweep", parameter="sigma")


# -- all kinds -----------------------------------------------------------------------------------


def test_noise_is_not_blown_up() -> None:
    """Bars that differ by hundredths of a per cent, or bytes by a thousandth, look alike."""
    held = [
        made.document(
            f"streaming_llm(recent=60) | lazy(every={every})", None, 0.05 + every * 1e-6, 0.2, spec={"grid": "sweep"},
            bytes={"peak": 1_000_000 + every},
        )
        for every in (2, 4, 8)
    ]  # fmt: skip
    blocks = make("sweep", None, made.experiment(held), parameter="every", metrics=["change", "peak"])  # fmt: skip
    change, peak = (axes.get_ylim() for axes in figure(blocks).axes)
    assert change[1] - change[0] == pytest.approx(0.02)
    assert peak[1] - peak[0] == pytest.approx(0.05 * 1e6, rel=0.01)


def test_a_full_caches_rounding_does_not_stretch_an_axis() -> None:
    held = [made.document("none", None, 1e-9), made.document("int4", None, 0.02, 0.25)]
    axes = figure(make("pareto", None, made.experiment(held), y="kl")).axes[0]
    assert axes.yaxis.get_transform().linthresh == pytest.approx(0.02)  # type: ignore[attr-defined]


def test_one_large_difference_does_not_hide_the_others() -> None:
    harm = {"a": 0.01, "b": 0.011, "c": 0.012, "d": 5.0}
    held = [made.document("none", None, 0.0), *(made.document(n, None, h) for n, h in harm.items())]
    axes = figure(make("ablation", None, made.experiment(held), metric="kl")).axes[0]
    assert axes.get_xscale() == "symlog"
    axes = figure(make("ablation", None, made.experiment(held[:-1]), metric="kl")).axes[0]
    assert axes.get_xscale() == "linear"


def test_steps_have_the_names_of_other_figures() -> None:
    held = [made.document("none"), made.document("streaming_llm(recent=60)", spec={"name": "strict"})]  # fmt: skip
    drawn = figure(make("steps", None, made.experiment(held)))
    assert [t.get_text() for t in drawn.legends[0].get_texts()] == ["none (full cache)", "strict"]


def test_kinds_are_found_by_being_there() -> None:
    folder = Path(kinds.__file__).parent
    files = {p.stem for p in folder.glob("*.py") if not p.stem.startswith("_")}
    assert set(kinds.found()) == files and "table" in files
    for kind in kinds.found().values():
        assert callable(kind.make) and isinstance(kind.OPTIONS, dict)


def test_unknown_kinds_and_options_are_named() -> None:
    with pytest.raises(ValueError, match="kind 'pie' is none of ablation"):
        kinds.check(Figure("pie", "x"))
    with pytest.raises(ValueError, match="table has no option 'colums' "):
        kinds.check(Figure("table", "x", options={"colums": []}))
    with pytest.raises(ValueError, match="metric 'f1': one of perplexity"):
        make("table", "main", columns=["f1"])


@pytest.mark.parametrize("kind", sorted(set(kinds.found()) - {"table"}))
def test_every_kind_says_what_is_missing(kind: str) -> None:
    only = [Outcome(made.spec("h2o", "25%"), failed="out of memory")]
    options = {"sweep": {"parameter": "recent"}, "heat": {"x": "recent", "y": "sinks"}}.get(
        kind, {}
    )
    with pytest.raises(Missing):
        make(kind, None, made.experiment(only), **options)


@pytest.mark.parametrize("figure_", made.FIGURES, ids=lambda f: f.kind)
def test_axes_are_labelled(figure_: Figure) -> None:
    if figure_.kind in ("table", "energy", "manifold", "tokens"):
        pytest.skip("no axes of its own")
    for block in make(figure_.kind, figure_.grid, **figure_.options):
        if isinstance(block, Picture):
            assert block.alt and block.figure.get_suptitle()
            for axes in block.figure.axes:
                column = axes.get_shared_x_axes().get_siblings(axes)
                line = axes.get_shared_y_axes().get_siblings(axes)
                named = any(a.get_xlabel() for a in column) and any(
                    a.get_ylabel() or a.get_yticklabels() for a in line
                )
                assert named or not axes.axison or axes.get_label() == "<colorbar>"


def test_every_grid_of_several_models_has_a_figure_each() -> None:
    outcomes = [made.document("none", spec={"model": m}) for m in ("a", "b/c")]
    parts = Data.of(made.experiment(outcomes), Figure("pareto", "X"), Path()).by_model()
    assert [p.figure.title for p in parts] == ["X (a, float32)", "X (c, float32)"]
    assert [len(p.outcomes) for p in parts] == [1, 1]


def test_looks_are_the_same_in_every_figure() -> None:
    colours = []
    for kind, options in (("pareto", {"y": "kl"}), ("retention", {"y": "kl"})):
        axes = figure(make(kind, "main", **options)).axes[0]
        colours.append({str(c.get_label()): c.lines[0].get_color() for c in axes.containers})  # type: ignore[attr-defined]
    assert colours[0] == colours[1] and len(set(itertools.chain(colours[0].values()))) == 5
