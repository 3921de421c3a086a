"""The published face of streaming KVQuant: a config, and a model that compresses by itself.

    config = CompressionConfig(chunk_size=512, key_bits_normal=4)
    model = CompressedModelForCausalLM.from_pretrained(name, compression_config=config)
    model.generate(**inputs)
    model.get_compression_stats()

A thin skin: the config is another spelling of a recipe, the model is transformers' own with a
`CompressedCache` wherever it would have made a `DynamicCache`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from kvloom.core.recipe import Recipe
from kvloom.formats.streaming_kvquant import StreamingKVQuant
from kvloom.hf.cache import CompressedCache

BITS = (2, 3, 4, 8, 16)
STATS = (
    "avg_key_bits", "avg_value_bits", "avg_key_code_bits", "avg_value_code_bits", "outlier_ratio",
    "compression_ratio_key", "compression_ratio_value", "total_outliers", "layer_stats",
)  # fmt: skip


@dataclass(frozen=True)
class CompressionConfig:
    """The parameters of streaming KVQuant under their published names; see `StreamingKVQuant`.

    Attributes:
        chunk_size: tokens that share scales; pages are of 64, so a chunk has the whole ones in it, and
            in one forward's tokens.
        ema_decay: of the moving absmax. attention_sink_size: first tokens of a row, kept exact.
        key_bits_normal, value_bits_normal: 2, 3, 4, 8; 16: that part stays exact.
        key_bits_sink_outlier, value_bits_sink_outlier: of outlier channels (sinks stay exact).
        outlier_threshold_relative, outlier_threshold_abs, outlier_detection_enabled: which they are.
        value_quant_groups: groups of a head's value channels with one scale; 0: one per channel.
        key_quant_per_channel, quantize_pre_rope, enable_mixed_precision_cache, adaptive_chunk_size:
            switches. periodic_stat_reset: start statistics over every `stat_reset_interval` chunks.

    Raises:
        ValueError: if a value breaks its rule.
    """

    chunk_size: int = 512
    ema_decay: float = 0.9
    attention_sink_size: int = 4
    key_bits_normal: int = 4
    value_bits_normal: int = 4
    key_bits_sink_outlier: int = 8
    value_bits_sink_outlier: int = 8
    outlier_threshold_relative: float = 3.0
    outlier_threshold_abs: float | None = None
    outlier_detection_enabled: bool = True
    value_quant_groups: int = 0
    key_quant_per_channel: bool = True
    quantize_pre_rope: bool = True
    enable_mixed_precision_cache: bool = True
    adaptive_chunk_size: bool = False
    periodic_stat_reset: bool = False
    stat_reset_interval: int = 1000

    def __post_init__(self) -> None:
        for name, value in self.to_dict().items():
            problem = _problem(name, value)
            if problem:
                raise ValueError(f"CompressionConfig({name}={value!r}): {problem}")
        if self.chunk_size < 64:
            raise ValueError(
                f"CompressionConfig(chunk_size={self.chunk_size}): scales belong to pages of 64 "
                "tokens, so a chunk has 64 or more"
            )

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-ready."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> CompressionConfig:
        """The inverse of `to_dict`; fields left out have their defaults. Raises ValueError on others."""
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ValueError(
                f"CompressionConfig has no {', '.join(unknown)}; it has {', '.join(known)}"
            )
        return cls(**given)

    def recipe(self) -> Recipe:
        """The recipe that this config stands for; with 16 bits for keys and values, `none`."""
        if self.key_bits_normal == self.value_bits_normal == 16:
            return Recipe()
        fmt = StreamingKVQuant(
            key_bits=self.key_bits_normal,
            value_bits=self.value_bits_normal,
            key_outlier_bits=self.key_bits_sink_outlier,
            value_outlier_bits=self.value_bits_sink_outlier,
            chunk=self.chunk_size // 64 * 64,
            decay=self.ema_decay,
            sinks=self.attention_sink_size,
            relative=self.outlier_threshold_relative,
            absolute=self.outlier_threshold_abs,
            detect=self.outlier_detection_enabled,
            key_per_channel=self.key_quant_per_channel,
            value_groups=self.value_quant_groups,
            rope="pre" if self.quantize_pre_rope else "post",
            mixed_precision=self.enable_mixed_precision_cache,
            adaptive=self.adaptive_chunk_size,
            reset=self.stat_reset_interval if self.periodic_stat_reset else 0,
        )
        return Recipe.of(fmt)


SWITCHES = {f.name for f in dataclasses.fields(CompressionConfig) if f.type == "bool"}
SIZES = {"chunk_size", "attention_sink_size", "value_quant_groups", "stat_reset_interval"}


def _problem(name: str, value: Any) -> str | None:
    """The rule that a field's value breaks."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if name in SWITCHES:
        return None if isinstance(value, bool) else "True or False"
    if "_bits_" in name:
        if value == 1 and number:
            return "1 bit has no symmetric scale: max|x| / (2^0 - 1) divides by zero"
        return None if type(value) is int and value in BITS else f"bits are one of {BITS}"
    if name in SIZES:
        least = 1 if name == "stat_reset_interval" else 0
        return None if type(value) is int and value >= least else f"an int, {least} or more"
    if name == "ema_decay":
        return None if number and 0 < value < 1 else "a decay is between 0 and 1, both excluded"
    if name == "outlier_threshold_relative":
        return None if number and value > 1 else "a relative threshold is above 1"
    return None if value is None or (number and value > 0) else "a threshold above 0, or None"


class CompressedModelForCausalLM:
    """A causal language model of transformers whose own caches are compressed.

    `from_pretrained` returns the model's usual class with this one mixed in: `generate`, and plain
    calls with `use_cache`, get a fresh `CompressedCache` unless they are given `past_key_values`
    (plain calls that record gradients only if they say `use_cache=True`).
    Nothing else about the model changes: it is saved, moved and dispatched as ever, and other
    instances of its class are not touched.
    """

    compression_recipe: Recipe
    compression_config: CompressionConfig | None
    _compressed_cache: CompressedCache | None

    @classmethod
    def from_pretrained(
        cls,
        name: Any,
        *args: Any,
        compression_config: CompressionConfig | Mapping[str, Any] | str | Recipe | None = None,
        **kwargs: Any,
    ) -> Any:
        """`AutoModelForCausalLM.from_pretrained`, then compressed.

        Args:
            name, args, kwargs: transformers'.
            compression_config: a config, its dict, or any recipe that needs no budget, such as
                `"kivi"` or a format of your own; None: the recommended config.

        Raises:
            ValueError: if the config is wrong, or the model cannot be compressed so.
        """
        if isinstance(compression_config, Mapping):
            compression_config = CompressionConfig.from_dict(compression_config)
        config = CompressionConfig() if compression_config is None else compression_config
        return compressed(AutoModelForCausalLM.from_pretrained(name, *args, **kwargs), config)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Transformers' `generate`, with a compressed cache."""
        settings = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
        default = getattr(settings or self.generation_config, "use_cache", None)  # type: ignore[attr-defined]
        self._provide(kwargs, default)
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, with a compressed cache where it would have made one."""
        # caches detach what they hold: where gradients are wanted, only if one is asked for
        default = self.config.use_cache and not torch.is_grad_enabled()  # type: ignore[attr-defined]
        if len(args) < 4:  # the fourth is past_key_values
            self._provide(kwargs, default)
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def _provide(self, kwargs: dict[str, Any], default: bool | None) -> None:
        """Put a fresh cache into `kwargs`, unless there is one or none is wanted."""
        use = kwargs.get("use_cache")
        use = default if use is None else use
        if use is not False and kwargs.get("past_key_values") is None:
            self.reset_compression_state()
            self._compressed_cache = CompressedCache(self, self.compression_recipe)
            kwargs["past_key_values"] = self._compressed_cache

    def get_compression_stats(self) -> dict[str, Any]:
        """Figures of the last cache that the model made, as in `CacheStats`; zeros before the first.

        Bits are effective ones; `avg_key_code_bits`, `avg_value_code_bits` leave metadata out.
        """
        cache = self._compressed_cache or CompressedCache(self, self.compression_recipe)
        stats = cache.stats().to_dict()
        return {name: stats[name] for name in STATS}

    def reset_compression_state(self) -> None:
        """Let go of the last cache and its statistics (every new cache starts afresh anyway)."""
        self._compressed_cache = None


CompressedLlamaForCausalLM = CompressedModelForCausalLM  # the published name


def compressed(model: nn.Module, config: CompressionConfig | str | Recipe) -> Any:
    """The same `model`, now a `CompressedModelForCausalLM` as well; if it is one already, its recipe is
    replaced.

    Raises ValueError if the recipe and the model do not fit; the model is then as it was.
    """
    own = type(model)
    if issubclass(own, CompressedModelForCausalLM):
        own = own.__bases__[1]  # what it was before, see below
    given = config if isinstance(config, CompressionConfig) else None
    recipe = given.recipe() if given else Recipe.parse(config)  # type: ignore[arg-type]
    CompressedCache(model, recipe)  # raises if the two do not fit
    # a class for this instance alone, under its old name: that is what gets written into config.json
    mixed = type(own.__name__, (CompressedModelForCausalLM, own), {"__module__": own.__module__})
    model.__class__ = mixed
    model.compression_config, model.compression_recipe = given, recipe  # type: ignore[assignment]
    model._compressed_cache = None  # type: ignore[assignment]
    return model
