"""What `kvloom calibrate` found out about a model: a safetensors file that `kvquant` reads.

Everything but the widths is per layer that the cache compresses, L of them; K = 2^bits.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvloom.core.format import Place
from kvloom.core.policy import Policy, check
from kvloom.formats._levels import Levels

KIND, HEADER = "kvloom.kvquant.1", "calibration"
BOOKS = ("key_levels", "key_matched", "value_levels", "value_matched")
HOW = "make one with `kvloom calibrate`"


@dataclass(frozen=True)
class Calibration:
    """Ranges and levels for one model, number of bits and share of outliers.

    Attributes:
        key_offset, key_scale: fp16 `[L, H, D]`, middle and half width of a pre-RoPE key channel's
            range without outliers.
        key_levels, value_levels: fp32 `[L, K]`, ascending; key_matched, value_matched: with Q-norm.
        text_blocks: int64 `[n]`, hashes of the blocks of tokens that were read.
        facts: text about model, text and versions; `bits` and `outliers` are always there.
    """

    key_offset: Tensor
    key_scale: Tensor
    key_levels: Tensor
    key_matched: Tensor
    value_levels: Tensor
    value_matched: Tensor
    text_blocks: Tensor
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def bits(self) -> int:
        return int(self.facts["bits"])

    @property
    def outliers(self) -> float:
        return float(self.facts["outliers"])

    @property
    def shape(self) -> tuple[int, ...]:
        """Layers, KV heads and key channels."""
        return tuple(self.key_offset.shape)

    def levels(self, layer: int) -> tuple[Levels, Levels]:
        """Levels of a layer, of keys and of values, each plain and with Q-norm."""
        keys = self.key_levels[layer], self.key_matched[layer]
        return keys, (self.value_levels[layer], self.value_matched[layer])

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all. Raises OSError."""
        target = Path(path)
        part = target.with_name(target.name + ".part")
        tensors = {n: getattr(self, n).contiguous() for n in _tensors()}
        try:
            header = json.dumps({"kind": KIND, **self.facts}, sort_keys=True)
            save_file(tensors, part, {HEADER: header})  # one key: several come in any order
            part.replace(target)
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from None
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read a file. Raises ValueError if it is none that `kvloom calibrate` wrote."""
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads((file.metadata() or {}).get(HEADER, "{}"))
                kind = facts.pop("kind", None) if isinstance(facts, dict) else None
                names = set(file.keys())
                if kind != KIND or names != set(_tensors()):
                    raise ValueError(f"calibration {str(path)!r} is not a file of kind {KIND!r}")
                made = cls(**{n: file.get_tensor(n) for n in names}, facts=facts)
        except (OSError, SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"calibration {str(path)!r} cannot be read: {error}; {HOW}") from None
        made._check(path)
        return made

    def _check(self, path: str | Path) -> None:
        sound = len(self.shape) == 3
        try:
            levels = (*self.shape[:1], 1 << self.bits)
            sound &= 0 <= self.outliers < 1
        except (KeyError, ValueError):
            sound, levels = False, ()
        sound &= self.key_scale.shape == self.key_offset.shape and self.text_blocks.ndim == 1
        books = {name: getattr(self, name) for name in BOOKS}
        if not sound or any(tuple(book.shape) != levels for book in books.values()):
            shapes = ", ".join(f"{name} {tuple(getattr(self, name).shape)}" for name in _tensors())
            asked = {name: self.facts.get(name) for name in ("bits", "outliers")}
            raise ValueError(
                f"calibration {str(path)!r}: bits, layers and shapes do not agree: {asked}, {shapes}"
            )
        for name, book in books.items():
            for layer, level in enumerate(book):
                if not bool(level.isfinite().all() and (level.diff() >= 0).all()):
                    raise ValueError(
                        f"calibration {str(path)!r}: {name} of layer {layer} are {level.tolist()}, "
                        "and levels are finite and ascend"
                    )
        for name in ("key_offset", "key_scale"):
            x = getattr(self, name)
            if not bool(x.isfinite().all()) or (name == "key_scale" and not bool((x > 0).all())):
                raise ValueError(
                    f"calibration {str(path)!r}: {name} lies between {float(x.min())} and "
                    f"{float(x.max())}, and offsets are finite, scales above 0"
                )


def calibrated(
    policy: Policy, path: str | None, place: Place, **asked: float
) -> Calibration | None:
    """The file of `path`, if one is named. Raises ValueError if it does not fit the layer, or was
    made with other parameters than `asked`.
    """
    if path is None:
        return None
    found = Calibration.load(path)
    for name, value in asked.items():
        made = getattr(found, name)
        check(policy, made == value, f"the calibration was made with {name}={made!r}")
    shape = (place.layers, place.heads, place.key_dim)
    mine = "{} layers of {} KV heads, {} wide".format
    check(
        policy,
        found.shape == shape,
        f"the calibration is of {mine(*found.shape)}; this model has {mine(*shape)}",
    )
    return found


def _tensors() -> list[str]:
    return [f.name for f in fields(Calibration) if f.name != "facts"]
