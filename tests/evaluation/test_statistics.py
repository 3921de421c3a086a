from __future__ import annotations

import itertools
import math
import random
import statistics as stdlib

import pytest
import torch

from kvloom.evaluation import statistics


def exact_interval(values: list[float]) -> tuple[float, float]:
    """The percentiles over every possible resample: n^n of them, each as likely."""
    means = sorted(sum(x) / len(values) for x in itertools.product(values, repeat=len(values)))
    return tuple(means[math.ceil(q * len(means)) - 1] for q in (0.025, 0.975))  # type: ignore[return-value]


def test_mean_and_deviation_are_those_of_the_standard_library() -> None:
    values = [3.0, 1.5, 4.25, -2.0, 8.0]
    found = statistics.summary(values)
    assert found.mean == pytest.approx(stdlib.fmean(values), rel=1e-15)
    assert found.deviation == pytest.approx(stdlib.stdev(values), rel=1e-15)
    assert found.count == 5


@pytest.mark.parametrize("values", [[0.0, 1.0], [1.0, 2.0, 4.0], [0.0, 0.0, 1.0, 5.0], [1.0, 2.0, 4.0, 8.0, 16.0]])  # fmt: skip
def test_the_interval_is_that_of_all_possible_resamples(values: list[float]) -> None:
    found = statistics.summary(values, resamples=200_000)
    # drawn percentiles may fall on the neighbour in a discrete distribution where its steps are even
    low, high = exact_interval(values)
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-9), pytest.approx(high, abs=1e-9))


def test_the_interval_holds_the_middle_of_the_resampled_means() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 7.0, 9.0, 12.0], dtype=torch.float64)
    found = statistics.summary(values.tolist())
    means = sorted(statistics.resampled_means(values, statistics.RESAMPLES, 0).tolist())
    cuts = stdlib.quantiles(means, n=40, method="inclusive")  # steps of 2.5 %
    assert (found.low, found.high) == (pytest.approx(cuts[0]), pytest.approx(cuts[-1]))


def test_the_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    draw = random.Random(1)
    covered = 0
    for seed in range(300):
        found = statistics.summary([draw.gauss(5.0, 2.0) for _ in range(30)], 500, seed)
        assert found.low is not None and found.high is not None
        covered += found.low <= 5.0 <= found.high
    assert 0.89 <= covered / 300 <= 0.985  # 95 % less what a percentile bootstrap of 30 lacks


def test_the_same_values_give_the_same_interval_and_another_seed_another() -> None:
    values = [0.3, 0.1, 0.7, 0.2, 0.9, 0.4, 0.35]
    assert statistics.summary(values) == statistics.summary(values)
    assert statistics.summary(values, seed=1) != statistics.summary(values)


def test_equal_values_have_no_width_and_one_value_has_no_interval() -> None:
    assert statistics.summary([2.0, 2.0, 2.0]) == statistics.Summary(2.0, 0.0, 2.0, 2.0, 3)
    assert statistics.summary([2.0]) == statistics.Summary(2.0, None, None, None, 1)


def test_what_is_not_finite_is_kept_and_has_no_interval() -> None:
    found = statistics.summary([1.0, math.inf])
    assert (found.mean, found.low, found.deviation) == (math.inf, None, None)
    assert math.isnan(statistics.summary([1.0, math.nan]).mean)


def test_no_values_and_no_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="no values"):
        statistics.summary([])
    with pytest.raises(ValueError, match="2 and 1 values are no pairs"):
        statistics.difference([1.0, 2.0], [1.0])


def test_pairs_take_out_what_both_share() -> None:
    shared = [1.0, 50.0, 100.0, 200.0]
    first = [s + d for s, d in zip(shared, [1.0, 1.1, 0.9, 1.2], strict=True)]
    found = statistics.difference(first, shared)
    assert found.mean == pytest.approx(1.05) and found.clear
    assert found.low is not None and 0.9 <= found.low <= found.mean
    alone, other = statistics.summary(first), statistics.summary(shared)
    assert alone.low is not None and other.high is not None and alone.low < other.high


def test_a_difference_is_clear_only_if_zero_is_outside() -> None:
    assert not statistics.difference([1.0, -1.0, 2.0], [0.0, 0.0, 0.0]).clear
    assert statistics.difference([-1.0, -2.0, -1.5], [0.0, 0.0, 0.0]).clear
    assert not statistics.summary([3.0]).clear
