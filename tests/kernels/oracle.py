"""Attention by the definition: float64, one query at a time, only over the entries it may see."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor


@dataclass
class Case:
    """Inputs of one call; see `kvloom.kernels.reference` for the shapes."""

    query: Tensor
    keys: Tensor
    values: Tensor
    scale: float
    softcap: float | None = None
    bias: Tensor | None = None
    mask: Tensor | None = None

    @property
    def options(self) -> dict:
        names = ("scale", "softcap", "bias", "mask")
        return {name: getattr(self, name) for name in names}

    def to(self, dtype: torch.dtype) -> Case:
        tensors = (x.to(dtype) for x in (self.query, self.keys, self.values))
        return Case(*tensors, **self.options)

    def part(self, start: int, stop: int) -> Case:
        """The entries `start .. stop` alone."""
        bias = None if self.bias is None else self.bias[..., start:stop]
        mask = None if self.mask is None else self.mask[..., start:stop]
        keys, values = self.keys[:, :, start:stop], self.values[:, :, start:stop]
        return Case(self.query, keys, values, self.scale, self.softcap, bias, mask)


def exact(case: Case, sinks: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """`(out, lse, weights [B, H, G, Q, S])` in float64."""
    B, H, G, Q, _ = case.query.shape
    S, E = case.values.shape[2:]
    out = torch.zeros(B, H, G, Q, E, dtype=torch.float64)
    lse = torch.full((B, H, G, Q), -math.inf, dtype=torch.float64)
    weights = torch.zeros(B, H, G, Q, S, dtype=torch.float64)
    mask = None if case.mask is None else case.mask.expand(B, H, Q, S)
    for b, h, g, q in torch.cartesian_prod(*(torch.arange(n) for n in (B, H, G, Q))).tolist():
        seen = []
        for s in range(S):
            bias = 0.0 if case.bias is None else float(case.bias[b, h, s])
            if bias == -math.inf or (mask is not None and not mask[b, h, q, s]):
                continue
            logit = float(case.query[b, h, g, q].double() @ case.keys[b, h, s].double())
            logit *= case.scale
            if case.softcap is not None:
                logit = case.softcap * math.tanh(logit / case.softcap)
            seen.append((s, logit + bias))
        everything = [x for _, x in seen] + ([] if sinks is None else [float(sinks[h, g])])
        if not everything:
            continue
        top = max(everything)
        total = sum(math.exp(x - top) for x in everything)
        lse[b, h, g, q] = top + math.log(total)
        for s, x in seen:
            weights[b, h, g, q, s] = math.exp(x - top) / total
            out[b, h, g, q] += weights[b, h, g, q, s] * case.values[b, h, s].double()
    return out, lse, weights


def naive(case: Case, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Plain softmax attention in the inputs' own dtype: the error that everyone accepts."""
    dtype = case.query.dtype
    logits = case.query @ case.keys.unsqueeze(2).transpose(-1, -2) * case.scale
    if case.softcap is not None:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    if case.bias is not None:
        logits = logits + case.bias.to(dtype)[:, :, None, None, :]
    if case.mask is not None:
        logits = logits.masked_fill(~case.mask.unsqueeze(-3), -math.inf)
    if sinks is not None:
        sink = sinks.to(dtype)[None, :, :, None, None].expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, sink], -1)
    weights = torch.softmax(logits, -1).nan_to_num(0.0)  # a query that sees nothing
    weights = weights[..., : case.keys.shape[2]]
    return weights @ case.values.unsqueeze(2), torch.logsumexp(logits.float(), -1)


def error(got: Tensor, want: Tensor) -> float:
    """Largest absolute error; infinities must agree exactly."""
    got, want = got.double(), want.double()
    assert got.shape == want.shape
    assert torch.equal(torch.isinf(got), torch.isinf(want))
    assert not torch.isnan(got).any()
    finite = torch.isfinite(want)
    return float((got[finite] - want[finite]).abs().max()) if finite.any() else 0.0


def assert_as_good_as_naive(
    got: tuple[Tensor, Tensor], case: Case, dtype: torch.dtype, sinks: Tensor | None = None
) -> None:
    """At most twice the naive error, plus one rounding of the result in `dtype`.

    The normaliser is handed on in fp32: rounding a log-sum-exp of size x scales all weights by up
    to x times fp32's epsilon, whatever the dtype.
    """
    out, lse, _ = exact(case, sinks)
    naive_out, naive_lse = naive(case.to(dtype), sinks)
    finite = lse[torch.isfinite(lse)]
    size = 1.0 + (float(finite.abs().max()) if finite.numel() else 0.0)
    reach = float(case.values.double().abs().max()) if case.values.numel() else 0.0
    rounding, normaliser = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps * size
    assert error(got[0], out) <= 2 * error(naive_out, out) + (rounding + normaliser) * reach
    assert error(got[1], lse) <= 2 * error(naive_lse, lse) + rounding * size


@st.composite
def cases(
    draw: st.DrawFn,
    softcap: bool = True,
    same_width: bool = False,
    least: int = 0,
) -> Case:
    """Small random calls: dead slots, masks of several shapes, queries that see nothing."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    B, H, G, Q = (draw(st.integers(1, n)) for n in (2, 2, 3, 4))
    S, D = draw(st.integers(least, 12)), draw(st.sampled_from([2, 8, 16]))
    E = D if same_width else draw(st.sampled_from([1, 8, 24]))

    def normal(*shape: int) -> Tensor:
        # values that every dtype holds exactly, so that only the arithmetic differs
        return (torch.randn(*shape, generator=generator) * 8).round() / 8

    bias = mask = None
    if draw(st.booleans()):
        mass = torch.randint(1, 1000, (B, H, S), generator=generator).float().log()
        dead = torch.rand(B, H, S, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))
        bias = mass.masked_fill(dead, -math.inf)
    if draw(st.booleans()):
        rows, heads = draw(st.sampled_from([1, B])), draw(st.sampled_from([1, H]))
        queries = draw(st.sampled_from([1, Q]))
        shape = (rows, heads, queries, S)
        mask = torch.rand(*shape, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    cap = draw(st.sampled_from([None, 2.0, 30.0])) if softcap else None
    query, keys, values = normal(B, H, G, Q, D), normal(B, H, S, D), normal(B, H, S, E)
    return Case(query, keys, values, D**-0.5, cap, bias, mask)
