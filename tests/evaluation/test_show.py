from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from kvloom.evaluation import equal, figures, table
from kvloom.evaluation.results import Row, Subject
from tests.evaluation.conftest import ROW, changed


def one(recipe: str, budget: str | None = None, mean: float = 900.0, **parts: object) -> Row:
    baseline, evicts = recipe.startswith("recompute"), budget is not None
    subject = Subject(recipe, recipe, budget, baseline, evicts)
    return changed(ROW, **{"subject": subject, **parts, "bytes": {"mean": mean}})


# -- equal bytes ---------------------------------------------------------------------------------


def test_equal_bytes_are_said_and_unequal_ones_named() -> None:
    rows = [one("none"), one("a", "25%", 1000.0), one("b", "25%", 981.0)]
    assert equal.remarks(rows) == ["25%: equal bytes, within 2%."]
    rows += [one("c", "25%", 900.0), one("d", "50%", 100.0)]
    (said,) = equal.remarks(rows)
    assert said.startswith("25%: NOT equal bytes") and "c -10%" in said and "whole pages" in said
    assert "b -" not in said and "a -" not in said


def test_entries_are_not_bytes() -> None:
    (said,) = equal.remarks([one("a", "64tok", 1000.0), one("a | int4", "64tok", 300.0)])
    assert "entries are equal" in said and "a | int4 -70%" in said


def test_above_the_budget_is_said() -> None:
    rows = [changed(one("a", "10%", 900.0), bytes={"allowed": 800.0})]
    assert equal.budget_use(rows[0]) == pytest.approx(1.125)
    assert equal.remarks(rows) == ["Above their budget, since their floor is higher: a @ 10%."]


def test_a_percentage_is_of_the_compressed_layers_and_bytes_are_of_all() -> None:
    other = {"allowed": 800.0, "other_mean": 100.0}
    assert equal.budget_use(changed(one("a", "10%"), bytes=other)) == pytest.approx(1.0)
    assert equal.budget_use(changed(one("a", "800B"), bytes=other)) == pytest.approx(1.125)


def test_a_recipe_that_never_evicted_is_named_and_not_compared() -> None:
    rows = [one("a", "25%", 1000.0), one("b", "25%", 990.0)]
    rows += [changed(one("b | int4", "25%", 500.0), counts={"evicted": 0})]
    assert equal.remarks(rows) == [
        "25%: equal bytes, within 2%.",
        "Never evicted anything here, so these rows show a full cache or its format: b | int4 @ 25%.",
    ]
    none = changed(one("none"), counts={"evicted": 0})
    assert equal.remarks([none]) == [] and not equal.idle(none)


def test_equal_bytes_are_asserted() -> None:
    rows = [one("a", "25%", 1000.0), one("b", "25%", 981.0)]
    equal.require_equal(rows)
    excused = changed(one("c", "25%", 2000.0), bytes={"allowed": 1000.0})
    lazy = changed(one("d", "25%", 10.0), counts={"evicted": 0})
    equal.require_equal([*rows, excused, lazy])
    with pytest.raises(ValueError, match=r"NOT equal bytes.*e -10%"):
        equal.require_equal([*rows, one("e", "25%", 900.0)])
    with pytest.raises(ValueError, match="several budgets"):
        equal.require_equal([*rows, one("a", "50%", 1000.0)])


def test_groups_keep_the_order_and_put_the_unbudgeted_first() -> None:
    rows = [one("a", "50%"), one("none"), one("b", "25%"), one("c", "50%")]
    named = {b: [r.subject.recipe for r in g] for b, g in equal.groups(rows).items()}
    assert list(named.items()) == [(None, ["none"]), ("50%", ["a", "c"]), ("25%", ["b"])]


# -- tables --------------------------------------------------------------------------------------


def shown(rows: list[Row]) -> str:
    out = io.StringIO()
    console = Console(file=out, width=130)
    for part in (table.quality_table(rows), table.time_table(rows), *table.notes(rows)):
        console.print(part, markup=False)
    return out.getvalue()


def test_quality_stands_beside_bytes() -> None:
    rows = [
        one("none"),
        one("h2o", "25%", 2048.0, quality={"kl": None, "decode_perplexity": 9.9996}),
    ]
    first = next(line.split() for line in shown(rows).splitlines() if line.startswith(" 25%"))
    assert (
        first[:2] == ["25%", "h2o"] and first[2] == "2.0" and first[4] == "1.1" and "n/a" in first
    )
    assert "+0.0%" in first and "-0.0%" not in first and "1/2" in first


def test_times_stand_beside_the_full_cache() -> None:
    line = [x.split() for x in shown([one("none")]).splitlines() if x.split()[:1] == ["none"]][1]
    assert line == [
        "none",
        "100.0",
        "1.00x",
        "2.00",
        "2.00x",
        "3.00",
        "4.00",
        "491",
        "42",
        "1",
        "n/a",
    ]


def test_a_busy_machine_is_said() -> None:
    assert "busy" not in shown([one("none")])
    assert "load up to 5.0 on 2 cores" in shown([one("none", timing={"load": 5.0})])


def test_the_baselines_perplexity_is_not_compared() -> None:
    assert "on a sample" not in shown([one("none")])
    said = shown([one("none"), one("recompute(window=9, positions=5)", None, 0.0)])
    assert "on a sample" in said


def test_a_text_beyond_the_models_positions_is_said() -> None:
    assert "positions that" not in shown([one("none")])
    assert "longer than the 50 positions" in shown([one("none", model={"positions": 50})])


def test_large_caches_are_shown_in_larger_units() -> None:
    row = changed(one("none"), bytes={"peak": 50 * 2**20, "mean": 2.0**20})
    assert "MiB" in shown([row])
    row = changed(row, bytes={"peak": 50 * 2**30})
    assert "GiB" in shown([row])


# -- figures -------------------------------------------------------------------------------------


def lines(figure: Figure, panel: int) -> dict[str, tuple[list[float], list[float]]]:
    return {
        str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata()))
        for line in figure.axes[panel].lines
        if not str(line.get_label()).startswith("_")
    }


ROWS = [
    one("none", mean=4096.0),
    one("h2o", "25%", 1024.0, quality={"decode_perplexity": 13.0, "kl": 0.3}),
    one("h2o", "50%", 2048.0, quality={"decode_perplexity": 12.0, "kl": 0.2}),
    one("int4 [x]", "50%", 2048.0, quality={"needles_right": 2}),
    one("recompute(window=9, positions=5)", None, 0.0),
]


def test_quality_is_drawn_from_the_rows() -> None:
    figure = figures.quality(ROWS)
    assert lines(figure, 0)["h2o"] == ([1.0, 2.0], pytest.approx([0.3, 0.2]))
    assert lines(figure, 1)["h2o"] == ([1.0, 2.0], [0.3, 0.2])
    assert "recompute(window=9, positions=5)" in lines(figure, 0)
    assert "bytes" in figure.axes[0].get_xlabel() and "perplexity" in figure.axes[0].get_ylabel()


def test_recall_is_drawn_where_it_was_measured() -> None:
    with_needles = [changed(r, protocol={"needles": 2}) for r in ROWS]
    figure = figures.quality(with_needles)
    assert lines(figure, 2)["int4 [x]"] == ([2.0], [1.0])
    assert lines(figure, 2)["h2o"][1] == [0.5, 0.5]


def test_the_ratio_axis_is_dense_over_real_bytes() -> None:
    figure = figures.quality(ROWS)
    top = next(a for a in figure.axes if "ratio" in a.get_xlabel())
    ticks = dict(zip([t.get_text() for t in top.get_xticklabels()], top.get_xticks(), strict=True))
    dense = ROWS[0].bytes.dense_mean / 1024
    assert ticks and all(x == pytest.approx(dense / float(t[:-1])) for t, x in ticks.items())


def test_the_document_is_drawn_at_one_budget() -> None:
    figure = figures.over_document(ROWS)
    drawn = lines(figure, 0)
    assert set(drawn) == {
        "none (full cache)",
        "recompute(window=9, positions=5)",
        "h2o",
        "int4 [x]",
    }
    assert drawn["h2o"] == ([41, 42], [41.0, 42.0])
    assert lines(figure, 1)["h2o"] == ([41, 42], [900 / 1024, 1000 / 1024])
    assert lines(figure, 2)["h2o"] == ([41, 42], [2.0, 2.0])
    assert "50%" in figure.get_suptitle()


def test_a_document_of_many_recipes_shows_both_kinds_and_says_how_many() -> None:
    free = [one("none"), *(one(f"fixed{i}") for i in range(9))]
    for held, shown in ((1, 1), (3, 3), (9, 4)):
        figure = figures.over_document([*free, *(one(f"h{i}", "25%") for i in range(held))])
        drawn = lines(figure, 0)
        assert len(drawn) == figures.LINES and "none (full cache)" in drawn
        assert sum(name.startswith("h") for name in drawn) == shown
        assert f"({figures.LINES} of {10 + held} recipes)" in figure.get_suptitle()
    many = figures.over_document([one("none"), *(one(f"h{i}", "25%") for i in range(12))])
    assert len(lines(many, 0)) == figures.LINES and "8 of 13" in many.get_suptitle()
    assert "recipes)" not in figures.over_document(ROWS).get_suptitle()


@pytest.mark.parametrize(
    ("most", "unit", "marks"),
    [
        (700 * 1024, "KiB", ["0", "128", "256", "384", "512", "640"]),
        (2.4 * 2**20, "MiB", ["0", "0.5", "1", "1.5", "2", "2.5"]),
        (300, "B", ["0", "64", "128", "192", "256"]),
    ],
)
def test_bytes_are_marked_at_binary_steps_of_one_unit(
    most: float, unit: str, marks: list[str]
) -> None:
    rows = [changed(one("none"), series={"nbytes": [1, int(most)]})]
    figure = figures.over_document(rows)
    figure.draw_without_rendering()
    axes = figure.axes[1]
    shown = [
        t.get_text()
        for t in axes.get_yticklabels()
        if 0 <= t.get_position()[1] * 1024 <= 1.05 * most
    ]
    assert (axes.get_ylabel(), shown) == (f"{unit} of the cache", marks)


def test_one_slow_token_does_not_rule_the_times() -> None:
    n = 60
    times = {"seen": list(range(n)), "entries": [1.0] * n, "nbytes": [1] * n}
    slow = {**times, "seconds": [0.002] * (n - 2) + [5.0, 5.0]}
    rows = [changed(one(name), series=slow) for name in ("none", "a", "b")]
    assert figures.over_document(rows).axes[2].get_ylim() == (0, pytest.approx(3.0))


def test_lines_of_equal_height_have_different_dashes() -> None:
    figure = figures.over_document([one("none"), one("a"), one("b"), one("c")])
    styles = {str(line._dash_pattern) for line in figure.axes[0].lines}
    assert len(styles) == 4


def test_a_collapse_does_not_flatten_the_others() -> None:
    def scale(perplexity: float) -> str:
        rows = [*ROWS, one("bad", "25%", 512.0, quality={"decode_perplexity": perplexity})]
        return str(figures.quality(rows).axes[0].get_yscale())

    assert [scale(p) for p in (19.0, 2000.0)] == ["linear", "symlog"]


def test_what_is_not_finite_is_shown_and_not_drawn(tmp_path: Path) -> None:
    bad = {"decode_perplexity": math.inf, "kl": math.nan}
    rows = [*ROWS, one("bad", "25%", 512.0, quality=bad)]
    assert "bad" not in lines(figures.quality(rows), 0) and figures.draw(rows, tmp_path)
    line = next(x.split() for x in shown(rows).splitlines() if "bad" in x.split())
    assert "inf" in line and "+inf%" in line and "nan" in line


def test_figures_are_png_files(tmp_path: Path) -> None:
    none_measured = [changed(r, quality={"kl": None, "decode_perplexity": None}) for r in ROWS]
    for rows in (ROWS, ROWS[:1], none_measured):
        for path in figures.draw(rows, tmp_path):
            assert path.read_bytes().startswith(b"\x89PNG") and path.parent == tmp_path


def test_many_long_recipes_stay_readable() -> None:
    rows = [one(f"h2o(recent=0.{i}, sinks={'4' * 50})", "25%") for i in range(12)]
    drawn = lines(figures.over_document(rows), 0)
    assert len(drawn) <= figures.LINES and all(len(name) <= 48 for name in drawn)
