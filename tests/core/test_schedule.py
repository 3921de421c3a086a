"""The schedule against a per-token simulation written from the three published rules."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom import Lazy

STEPS = 18_000
CAPACITY = 2048  # prefill of 2,048 tokens, then one token at a time
INFINITE = 0  # as on the published command line
SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)


def simulate(rule, R, slack, drop, steps=STEPS, C=CAPACITY):
    """Lengths after each step, and the largest length before a prune."""
    L, t, last = C, C, C - 10**9
    limit = drop or 10**9
    lengths, peak = [], L
    for _ in range(steps):
        L, t = L + 1, t + 1
        peak = max(peak, L)
        if R == 0:
            pass
        elif rule == "paper":
            if t % R == 0 and C + slack < L:
                L -= min(L - C, limit)
        elif L - C >= R:
            target = min(max(L - limit, C), C + slack)
            if rule == "final":
                if t - last < R:
                    target = L
                else:
                    reachable = C + slack - (R - 1)
                    target = min(target, reachable) if reachable >= C else C
                    last = t
            L = target
        lengths.append(L)
    return lengths, peak


def drive(schedule, steps=STEPS, C=CAPACITY):
    """The same through `Lazy.target`, with the counters that a layer keeps."""
    capacity = torch.tensor([[C]])
    length, seen, since = torch.tensor([[C]]), torch.tensor([[C]]), torch.tensor([[10**6]])
    one, lengths, peak = torch.ones(1, 1, dtype=torch.int64), [], C
    for _ in range(steps):
        length, seen, since = length + one, seen + one, since + one
        target = schedule.target(length, capacity, seen, one, since)
        before, after = int(length), int(target)
        peak = max(peak, before)
        if after != before:
            since = torch.zeros_like(since)
        length = target
        lengths.append(after)
    return lengths, peak


def lazy(rule, R, slack, drop, **extra):
    return Lazy(every=R, slack=slack, max_drop=drop, rule=rule, **extra)


RULES = ["seed", "paper", "final"]
TABLE_2 = [(0, INFINITE), (0, 32), (16, INFINITE), (16, 32)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("slack", "drop"), TABLE_2)
def test_table_2_rows_are_one_and_the_same_pruning(rule, slack, drop):
    """R = 32, slack 0 or 16, max-drop none or 32: what the paper compared never differed."""
    want = simulate("seed", 32, 0, INFINITE)
    assert simulate(rule, 32, slack, drop) == want
    assert drive(lazy(rule, 32, slack, drop)) == want
    assert want[1] == CAPACITY + 32


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("R", "slack", "drop"),
    [(64, 16, INFINITE), (16, 40, 8), (1, 0, INFINITE), (1, 16, 32), (7, 6, 3), (5, 4, 2)],
)
def test_other_settings_equal_the_simulation(rule, R, slack, drop):
    schedule = lazy(rule, R, slack, drop, unbounded=True)
    assert drive(schedule, 3000) == simulate(rule, R, slack, drop, 3000)


def test_the_first_code_differs_where_max_drop_is_below_r():
    """R = 64, slack 16, max-drop 32: pruned to C + 16, 374 prunes instead of 281."""
    lengths, _ = drive(lazy("seed", 64, 16, 32))
    assert lengths == simulate("seed", 64, 16, 32)[0]
    assert prunes(lengths) == 374
    assert min(lengths[64:]) == CAPACITY + 16
    full, _ = drive(lazy("seed", 64, 0, 32))
    assert prunes(full) == 281


def prunes(lengths):
    return sum(b <= a for a, b in pairwise([CAPACITY, *lengths]))


def test_the_papers_rule_grows_without_bound_below_r():
    lengths, peak = drive(lazy("paper", 64, 16, 32, unbounded=True))
    assert (lengths, peak) == simulate("paper", 64, 16, 32)
    assert peak == CAPACITY + 9024
    later, _ = simulate("paper", 64, 16, 32, 2 * STEPS)
    assert later[-1] - CAPACITY > 1.9 * (lengths[-1] - CAPACITY)


@pytest.mark.parametrize("drop", [1, 32, 63])
def test_growth_is_refused_unless_asked_for(drop):
    with pytest.raises(ValueError, match=r"lazy.*grows without bound.*unbounded=True"):
        lazy("paper", 64, 0, drop)
    assert not lazy("paper", 64, 0, drop, unbounded=True).bounded
    assert lazy("paper", 64, 0, 64).bounded
    assert lazy("paper", 64, 0, INFINITE).bounded
    assert lazy("seed", 64, 0, drop).bounded


def test_slack_lets_the_final_code_stop_above_c_only_from_r_minus_1():
    for slack, floor in ((30, 0), (31, 0), (32, 1), (40, 9)):
        lengths, _ = drive(lazy("final", 32, slack, 4), 500)
        assert lengths == simulate("final", 32, slack, 4, 500)[0]
        assert min(lengths[40:]) == CAPACITY + floor


@pytest.mark.parametrize("rule", RULES)
def test_zero_never_compresses(rule):
    lengths, _ = drive(lazy(rule, 0, 16, 0), 500)
    assert lengths == list(range(CAPACITY + 1, CAPACITY + 501))
    assert not lazy(rule, 0, 0, 0).bounded


def test_one_is_strict():
    assert set(drive(Lazy(), 300)[0]) == {CAPACITY}


def settings_of(*rules):
    """Settings that cannot grow without bound."""
    return st.builds(
        lambda rule, R, slack, drop: (rule, R, slack, drop if rule != "paper" or drop >= R else 0),
        st.sampled_from(rules),
        st.integers(1, 40),
        st.integers(0, 50),
        st.integers(0, 60),
    )


@SETTINGS
@given(settings_of("seed", "final"), st.integers(1, 30))
def test_peak_length_is_max_of_c_plus_r_and_c_plus_slack_plus_1(setting, C):
    schedule = lazy(*setting)
    _, R, slack, _ = setting
    lengths, peak = drive(schedule, 200, C)
    assert (lengths, peak) == simulate(*setting, steps=200, C=C)
    bound = max(C + R, C + slack + 1)
    assert peak <= bound
    assert int(schedule.peak(torch.tensor([[C]]))) == bound
    assert min(lengths) >= C


@SETTINGS
@given(settings_of("paper"), st.integers(1, 30))
def test_the_papers_rule_can_wait_one_more_turn(setting, C):
    """A turn that finds L <= C + slack lets it pass, so the next one comes R tokens later."""
    _, R, slack, _ = setting
    lengths, peak = drive(lazy(*setting), 200, C)
    assert (lengths, peak) == simulate(*setting, steps=200, C=C)
    assert peak <= C + slack + R


@SETTINGS
@given(settings_of(*RULES), st.data())
def test_rows_and_heads_are_independent(setting, data):
    """A batch of ragged rows gets what each cell gets alone; nothing grows, nothing falls below C."""
    schedule = lazy(*setting)
    B, H = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    ints = st.integers(0, 120)
    new = torch.tensor(data.draw(st.lists(st.integers(0, 60), min_size=B, max_size=B)))[:, None]
    seen = new + torch.tensor(data.draw(st.lists(ints, min_size=B, max_size=B)))[:, None]
    since = torch.tensor(data.draw(st.lists(ints, min_size=B, max_size=B)))[:, None]

    def grid():
        return torch.tensor(data.draw(st.lists(ints, min_size=B * H, max_size=B * H))).view(B, H)

    length, capacity = grid(), grid()
    got = schedule.target(length, capacity, seen, new, since)
    for b in range(B):
        for h in range(H):
            cell = slice(b, b + 1), slice(h, h + 1)
            row = slice(b, b + 1)
            alone = schedule.target(length[cell], capacity[cell], seen[row], new[row], since[row])
            assert int(alone) == int(got[b, h])
    assert (got <= length).all()
    assert (got >= torch.minimum(length, capacity)).all()


@pytest.mark.parametrize("drop", [0, 20])
def test_a_chunk_is_as_many_boundaries_as_it_crosses(drop):
    """The paper's rule with several tokens per forward: one turn for each multiple of R passed."""
    schedule = lazy("paper", 16, 0, drop)
    capacity, length = torch.tensor([[100]]), torch.tensor([[170]])
    for seen, new, crossed in ((100, 3, 0), (96, 1, 1), (112, 70, 5), (170, 170, 10)):
        got = schedule.target(
            length, capacity, torch.tensor([[seen]]), torch.tensor([[new]]), torch.tensor([[new]])
        )
        want = 170 - min(70, crossed * drop if drop else (70 if crossed else 0))
        assert int(got) == want


@pytest.mark.parametrize("rule", ["seed", "final"])
def test_a_large_chunk_is_brought_back_at_once_without_max_drop(rule):
    big, ten = torch.tensor([[5000]]), torch.tensor([[10]])
    assert int(lazy(rule, 64, 16, 0).target(big, ten, big, big, big)) <= 10 + 16


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"every": -1}, "every must be an int >= 0"),
        ({"slack": -1}, "slack must be an int >= 0"),
        ({"max_drop": 1.5}, "max_drop must be an int >= 0"),
        ({"rule": "mine"}, "rule is 'seed', 'paper' or 'final'"),
    ],
)
def test_bad_parameters_are_restated(parameters, message):
    with pytest.raises(ValueError, match=f"lazy\\(.*{message}"):
        Lazy(**parameters)
