"""The row of evidence: everything that is published about one measured cell, as typed dataclasses.

A row is one line of JSON. Its units are in the field names or documented below: bytes, seconds,
tokens; `None` (JSON null) means "not measured" or "not available here", never zero; what came out as
no finite number is the text "nan", "inf" or "-inf". Perplexities are `exp` of a mean natural-log loss
per token.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass
from typing import Any

SCHEMA = "kvloom.cell"
VERSION = 2
_NOT_FINITE = ("nan", "inf", "-inf")


@dataclass(frozen=True)
class Model:
    """What was run.

    Attributes:
        name: path or hub name as given. sha256: of the config and of every parameter and buffer as
            loaded (so the dtype counts). type: transformers' model type. parameters: how many.
        layers, kv_heads, head_dim: of the decoder. positions: how many it was made for, if it says.
        dtype: e.g. `"bfloat16"`.
    """

    name: str
    sha256: str
    type: str
    parameters: int
    layers: int
    kv_heads: int
    head_dim: int
    positions: int | None
    dtype: str


@dataclass(frozen=True)
class Matched:
    """How a budget was adjusted until a cache held what the cell's own budget says (`matching`).

    Attributes:
        given: the budget that the cache had. tried: budgets in turn; held: mean bytes under each / bytes that
            the cell's budget means. reached: whether within 1 %. why: what prevented it, where not.
    """

    given: str
    tried: list[str]
    held: list[float]
    reached: bool
    why: str | None


@dataclass(frozen=True)
class Subject:
    """What was compared.

    Attributes:
        recipe: the shortest text. full: with every parameter spelled out,
            and files by their sha256. budget: as asked, in
            canonical spelling. baseline: True for `recompute(...)`, which is no cache. evicts: whether
            the recipe is one that can evict. matched: how the budget was adjusted to equal bytes; None,
            as in older rows: the cache had the budget as asked.
    """

    recipe: str
    full: str
    budget: str | None
    baseline: bool
    evicts: bool
    matched: Matched | None = None


@dataclass(frozen=True)
class Text:
    """What it was measured on. sha256: of the token ids, each as 8 bytes, little-endian."""

    name: str
    sha256: str
    tokens: int


@dataclass(frozen=True)
class Protocol:
    """How it was measured.

    Attributes:
        tokens: N, length of the document. prefill: P, tokens of the first part; the other tokens
            are fed one at a time. prefill_chunk: tokens per forward within the first part, 0: one
            forward. prefill_runs: prefills timed for TTFT, each beside a dense one.
        needles: retrieval tasks. needle_tokens: length of a task's context and question.
        needle_sha256: of all their token ids. seed: of the tasks.
    """

    tokens: int
    prefill: int
    prefill_chunk: int = 0
    prefill_runs: int = 3
    needles: int = 0
    needle_tokens: int = 0
    needle_sha256: str = ""
    seed: int = 0


@dataclass(frozen=True)
class Environment:
    """Where it was measured. git: commit of kvloom's checkout, `+dirty` if changed; None: installed.

    source_sha256: of kvloom's own sources that can influence a result. capability: the instructions
    that torch uses on this CPU, e.g. `"AVX2"`. backend: the kernels that served, e.g. `"cpu avx2"`, and
    how they multiplied if not by default; None, in older rows: torch.
    """

    kvloom: str
    git: str | None
    source_sha256: str
    python: str
    torch: str
    transformers: str
    platform: str
    cpu: str
    capability: str
    cores: int
    threads: int
    device: str
    backend: str | None


@dataclass(frozen=True)
class Bytes:
    """Live tensor storages of the cache, after commits.

    Attributes:
        final: at the end of the document; by_part: the same, split. mean, peak: over the tokens
            that were fed one at a time. prefill_peak: the most during the first part, where a layer
            holds all new tokens of a forward until it has compressed them, those included.
        other_mean: part of `mean` in layers that kvloom does not compress (sliding windows).
        dense: a 16-bit dense cache of the compressed layers at the end; dense_mean: its mean over
            the same tokens; dtype_dense: in the model's dtype, at the end.
        allowed: mean over these tokens of what the budget allows; None where it is not in bytes.
        floor: the least bytes that the recipe needs. slack: part of `final` without live entries.
        device_peak: most bytes that torch had allocated on the device during the last prefill timed
            for TTFT, model and activations included; None on the CPU.
        avg_key_bits, avg_value_bits: effective bits per stored element at the end, scales included.
    """

    final: int
    by_part: dict[str, int]
    mean: float
    peak: int
    prefill_peak: int
    other_mean: float
    dense: int
    dense_mean: float
    dtype_dense: int
    allowed: float | None
    floor: int
    slack: int
    device_peak: int | None
    avg_key_bits: float
    avg_value_bits: float

    @property
    def compressed_mean(self) -> float:
        """`mean` of the compressed layers alone."""
        return self.mean - self.other_mean

    @property
    def ratio(self) -> float | None:
        """Compression ratio of the compressed layers: 16-bit dense bytes / real bytes, means over the
        decoded tokens.
        """
        return self.dense_mean / self.compressed_mean if self.compressed_mean else None

    @property
    def dtype_ratio(self) -> float | None:
        """The same against a dense cache in the model's dtype, at the end."""
        held = self.final - self.by_part.get("other layers", 0)
        return self.dtype_dense / held if held else None


@dataclass(frozen=True)
class Quality:
    """How well the model predicts through the cache.

    Attributes:
        perplexity: of the whole document (tokens of the prefill see exact keys within a forward).
        decode_perplexity: of the tokens predicted from single-token forwards only.
        dense_perplexity, dense_decode_perplexity: a full cache on the same tokens, in lockstep.
        kl: mean over the decoded tokens of KL(dense || this), nats. kl_p99: its 99th percentile.
        top1: share of the decoded tokens where both rank the same token first.
        scored, decode_scored: how many tokens these are means of.
        needles_right, needles: retrieval tasks answered exactly, and asked.
    """

    perplexity: float | None
    decode_perplexity: float | None
    dense_perplexity: float | None
    dense_decode_perplexity: float | None
    kl: float | None
    kl_p99: float | None
    top1: float | None
    scored: int
    decode_scored: int
    needles_right: int
    needles: int

    @property
    def change(self) -> float | None:
        """Relative change of the decode perplexity against dense; 0.02 is two per cent worse."""
        if self.decode_perplexity is None or not self.dense_decode_perplexity:
            return None
        return self.decode_perplexity / self.dense_decode_perplexity - 1


@dataclass(frozen=True)
class Timing:
    """Seconds, after a warm-up, each stamped after the commit and a device synchronisation.

    Attributes:
        ttft: median over `prefill_runs`, from the prompt to the first token's logits.
        tpot, tpot_p95, tpot_worst: median, 95th percentile and maximum per single-token forward.
        decode: sum over all `steps` such forwards; throughput: tokens per second of it.
        dense_ttft, dense_tpot: medians of a full cache, measured in turns with this one;
            `dense_steps` forwards, at the same positions.
        ttft_ratio, tpot_ratio: this one's time / the full cache's, taken turn by turn (prefill by
            prefill, block by block of tokens); medians, so that a drift of the machine's speed does
            not matter. load: processes that wanted to run, mean over the last minute, at the end;
            None where the system does not tell.
    """

    ttft: float
    tpot: float
    tpot_p95: float
    tpot_worst: float
    decode: float
    steps: int
    throughput: float
    dense_ttft: float
    dense_tpot: float
    dense_steps: int
    ttft_ratio: float
    tpot_ratio: float
    load: float | None


@dataclass(frozen=True)
class Counts:
    """What the cache did over the document, summed over layers, each of which compresses by itself.

    Attributes:
        compressions, compactions: how often. evicted, merged, sealed: entries, over all KV heads.
    """

    compressions: int = 0
    evicted: int = 0
    merged: int = 0
    sealed: int = 0
    compactions: int = 0


@dataclass(frozen=True)
class Series:
    """The document in at most 200 bins, for figures; lists of equal length.

    Attributes:
        seen: tokens seen at the end of each bin. entries: kept per KV head then, mean over layers
            and heads. nbytes: most bytes within the bin. seconds: median per token within the bin.
        dense_seen, dense_seconds: the same for the dense companion, one value per block of tokens.
    """

    seen: list[int]
    entries: list[float]
    nbytes: list[int]
    seconds: list[float]
    dense_seen: list[int]
    dense_seconds: list[float]


@dataclass(frozen=True)
class Row:
    """One measured cell. `key` is the hash of everything that determines it (`identity.cell_key`)."""

    key: str
    measured_at: str
    took: float
    model: Model
    subject: Subject
    text: Text
    protocol: Protocol
    environment: Environment
    bytes: Bytes
    quality: Quality
    timing: Timing
    counts: Counts
    series: Series

    def to_json(self) -> str:
        """One line; see `to_line`."""
        return to_line(self, SCHEMA, VERSION)

    @classmethod
    def from_json(cls, line: str) -> Row:
        """Read a line. Raises ValueError if it is of another schema or version, or lacks a field."""
        row: Row = from_line(cls, line, SCHEMA, VERSION)
        return row


def to_line(row: Any, schema: str, version: int) -> str:
    """A dataclass as one line; numbers that are not finite become text, since JSON has none."""
    fields = {"schema": schema, "version": version, **dataclasses.asdict(row)}
    return json.dumps(_spelled(fields), separators=(",", ":"), allow_nan=False)


def from_line(kind: Any, line: str, schema: str, version: int) -> Any:
    """A line as the dataclass `kind`. Raises ValueError on another schema or version, or a field that
    is missing, unknown or of another type.
    """
    fields = json.loads(line)
    if not isinstance(fields, dict) or fields.pop("schema", None) != schema:
        raise ValueError(f"not a row of schema {schema!r}")
    found = fields.pop("version", None)
    if found != version:
        raise ValueError(f"schema {schema!r} version {found}, this kvloom reads {version}")
    return _read(kind, fields, "row")


def _spelled(value: Any) -> Any:
    """`value` with NaN and infinities replaced by one of `_NOT_FINITE`, at any depth."""
    if isinstance(value, dict):
        return {k: _spelled(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_spelled(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _read(kind: Any, value: Any, where: str) -> Any:
    """`value` as `kind`: a dataclass, `X | None`, `list[X]`, `dict[str, X]` or a plain type."""
    if dataclasses.is_dataclass(kind):
        return _read_fields(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return None if value is None else _read(arguments[0], value, where)
    if origin is list and isinstance(value, list):
        return [_read(arguments[0], v, where) for v in value]
    if origin is dict and isinstance(value, dict):
        return {k: _read(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    if kind is float and value in _NOT_FINITE:
        return float(value)
    wanted = (int, float) if kind is float else kind
    if origin is None and isinstance(value, wanted) and isinstance(value, bool) == (kind is bool):
        return value
    raise ValueError(f"{where} is {value!r}, not {getattr(kind, '__name__', kind)}")


def _read_fields(kind: Any, value: Any, where: str) -> Any:
    """Fields whose default is None came later, and may be absent."""
    names = {f.name for f in dataclasses.fields(kind)}
    given = set(value) if isinstance(value, dict) else set()
    late = {f.name for f in dataclasses.fields(kind) if f.default is None}
    odd = sorted((names ^ given) - (late - given))
    if odd or not isinstance(value, dict):
        raise ValueError(f"{where} lacks or has too many of: {', '.join(odd)}")
    hints = typing.get_type_hints(kind)
    return kind(**{n: _read(hints[n], value[n], f"{where}.{n}") for n in names & given})
