"""Streaming KVQuant's published rows.

`streaming_kvquant_int8`, `_int4`: neither sinks nor outlier channels are protected, and
`_int4_sink_outlier` protects both (perplexity claimed for Llama-2-7B: 5.72, 5.89, 5.74 beside 5.68
uncompressed). `_ablation_...`: the rows of the published ablation.
"""

from __future__ import annotations

from kvloom.core.registry import preset

_NAME = "streaming_kvquant"

for _row, _given in {
    "int8": "key_bits=8, value_bits=8, mixed_precision=False",
    "int4": "mixed_precision=False",
    "int4_sink_outlier": "",
    "ablation_int4": "mixed_precision=False",
    "ablation_sink": "detect=False",
    "ablation_outlier": "sinks=0",
    "ablation_full": "",
    "ablation_ema95": "decay=0.95",
}.items():
    preset(f"{_NAME}_{_row}", f"{_NAME}({_given})")
preset(f"{_NAME}_ablation_fp16", "none")
