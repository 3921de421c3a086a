"""Gradients of keys and values against the model's own projections under autograd."""

from __future__ import annotations

import copy

import pytest
import torch

from kvloom.hf.gradients import record
from kvloom.hf.rope import attention_modules
from tests.models import build, tokens


def by_hand(model, ids):
    """Outputs of the key and value projections of every layer `[H, T, D]`, and their gradients."""
    kept = []

    def keep(module, inputs, out):
        out.retain_grad()
        kept.append(out)

    hooks = []
    for _, module in sorted(attention_modules(model).items()):
        hooks += [module.k_proj.register_forward_hook(keep)]
        hooks += [module.v_proj.register_forward_hook(keep)]
    with torch.enable_grad():
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        loss = -torch.log_softmax(logits[:-1], -1).gather(1, ids[1:, None]).mean()
        loss.backward()
    for hook in hooks:
        hook.remove()
    width = next(iter(attention_modules(model).values())).head_dim
    return [
        tuple(x[0].unflatten(-1, (-1, width)).transpose(0, 1) for x in (out.detach(), out.grad))
        for out in kept
    ]


@pytest.mark.parametrize("family", ["llama", "llama_yarn", "glm", "cohere"])
def test_keys_before_rotation_and_real_gradients(family):
    """Yarn scales, GLM rotates half of the channels, Cohere pairs neighbours."""
    model, ids = build(family), tokens(30)[0]
    found, want = record(model, ids, gradients=True), by_hand(build(family), ids)
    assert len(found) == len(want) // 2 == 3
    for layer, (keys, key_grads), (values, value_grads) in zip(
        found, want[::2], want[1::2], strict=True
    ):
        torch.testing.assert_close(layer.keys, keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.values, values, rtol=1e-4, atol=1e-4)
        for got, grads in ((layer.key_grads, key_grads), (layer.value_grads, value_grads)):
            assert grads.abs().max() > 0
            torch.testing.assert_close(got, grads, rtol=1e-3, atol=1e-4 * float(grads.abs().max()))


def test_small_gradients_survive_fp16():
    """Those of a mean over many tokens are often below what fp16 holds; levels go by their ratios."""
    ids = tokens(40)[0]
    exact = build("llama")
    with torch.no_grad():
        exact.lm_head.weight *= 2e-5
    small = copy.deepcopy(exact).half()
    found, want = (record(model, ids, gradients=True) for model in (small, exact))
    for got, x in zip(found, want, strict=True):
        for name in ("key_grads", "value_grads"):
            a, b = getattr(got, name), getattr(x, name)
            assert float((a - b).norm() / b.norm()) < 0.1


def test_without_gradients_nothing_is_differentiated():
    model, ids = build("llama"), tokens(30)[0]
    plain = record(model, ids)
    assert all(x.key_grads is None and x.value_grads is None for x in plain)
    for a, b in zip(plain, record(model, ids, gradients=True), strict=True):
        torch.testing.assert_close(a.keys, b.keys, rtol=1e-4, atol=1e-4)


def test_weights_get_no_gradients_and_stay_trainable():
    model = build("llama")
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    record(model, tokens(12)[0], gradients=True)
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    assert not frozen.requires_grad


def test_only_full_attention_layers_are_recorded():
    assert len(record(build("gemma3"), tokens(20)[0], gradients=True)) == 1
