"""Named recipes: the published settings of the systems that kvloom brings together.

Lazy pruning for StreamingLLM (hopecommon/CS3602, Pythia-2.8B, a cap of 2,048 entries): S sinks, W
recent entries, every = R, slack, max_drop. `mit_streaming_llm` is the original method (arXiv:
2309.17453) at that cap. The published command line says W = 2,016 beside S = 32 and slack 16,
16 over the cap; its automatic cap, S + W + slack = 2,048, gives W = 2,000: `..._auto_cap`. The
`lazy_r32...` rows are the authors' ablation of `softlite`: all four prune exactly alike.

KnormPress (arXiv:2406.11430 as published in code: Pythia-70m, layer 0 exempt, pruning after every
token): keep 0.9 (recommended), 0.8 (balanced) and 0.7 (aggressive) of a layer that holds 512
entries or more; `..._extreme_...` from 32 entries on. Their evaluation stayed below 512 tokens, so
that nothing was ever pruned; the extreme ones are what pruning really did. `knormpress_fixed` is
the authors' later test: a fixed size (say budget="512tok"), half of it recent.
"""

from __future__ import annotations

from kvloom.core.registry import preset

CAP = 2048  # Pythia's positions


def _streaming(sinks: int, window: int, schedule: str = "") -> str:
    return f"streaming_llm(sinks={sinks}, recent={window})" + (schedule and f" | {schedule}")


preset("mit_streaming_llm", _streaming(4, CAP - 4))
for _name, _schedule in {
    "eager": "lazy(every=1, slack=16, max_drop=32)",
    "lazy_best": "lazy(every=64, slack=16, max_drop=32)",
    "softlite": "lazy(every=32, slack=16, max_drop=32)",
}.items():
    preset(_name, _streaming(32, 2016, _schedule))
    preset(f"{_name}_auto_cap", _streaming(32, CAP - 32 - 16, _schedule))
preset("lazy_r32", _streaming(32, 2016, "lazy(every=32)"))
preset("lazy_r32_slack", _streaming(32, 2016, "lazy(every=32, slack=16)"))
preset("lazy_r32_max_drop", _streaming(32, 2016, "lazy(every=32, max_drop=32)"))

for _suffix, _threshold in (("", 512), ("_extreme", 32)):
    for _percent in (90, 80, 70):
        preset(
            f"knormpress{_suffix}_{_percent}",
            f"knorm(mode='recurrent', keep_ratio={_percent / 100}, prune_after={_threshold}, "
            "skip_layers=(0,))",
        )
preset("knormpress", "knorm(mode='recurrent', keep_ratio=0.9, prune_after=512, skip_layers=(0,))")
preset("knormpress_fixed", "knorm(recent_fraction=0.5)")
