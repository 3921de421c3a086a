from __future__ import annotations

import json
import math

import pytest

from kvloom.evaluation.results import SCHEMA, VERSION, Row
from tests.evaluation.conftest import changed


def test_a_row_survives_its_line(row: Row) -> None:
    line = row.to_json()
    assert "\n" not in line and line.startswith(f'{{"schema":"{SCHEMA}","version":{VERSION},')
    assert Row.from_json(line) == row


def test_what_is_not_finite_is_not_what_was_not_measured(row: Row) -> None:
    odd = changed(row, quality={"kl": math.nan, "perplexity": math.inf, "top1": None})
    json.loads(odd.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    q = Row.from_json(odd.to_json()).quality
    assert q.kl is not None and math.isnan(q.kl) and (q.perplexity, q.top1) == (math.inf, None)


def test_ratios_leave_out_what_is_not_compressed(row: Row) -> None:
    other = {"other_mean": 540.0, "by_part": {"pages": 400, "other layers": 600}}
    b = changed(row, bytes=other).bytes
    assert (b.compressed_mean, b.ratio) == (360.0, pytest.approx(720 / 360))
    assert b.dtype_ratio == pytest.approx(1600 / 400)


def test_ratios_are_bytes_over_bytes(row: Row) -> None:
    assert row.bytes.ratio == pytest.approx(720 / 900)
    assert row.bytes.dtype_ratio == pytest.approx(1600 / 1000)
    assert row.quality.change == pytest.approx(0.1)
    empty = changed(row, bytes={"mean": 0.0, "final": 0}, quality={"decode_perplexity": None})
    assert (empty.bytes.ratio, empty.bytes.dtype_ratio, empty.quality.change) == (None, None, None)


@pytest.mark.parametrize(
    ("path", "value", "word"),
    [
        (("schema",), "other", "not a row"),
        (("version",), VERSION + 1, f"version {VERSION + 1}"),
        (("quality", "kl"), "0.1", "row.quality.kl"),
        (("bytes", "final"), 1.5, "row.bytes.final"),
        (("bytes", "final"), True, "row.bytes.final"),
        (("bytes", "by_part"), {"pages": None}, "row.bytes.by_part.pages"),
        (("series", "seen"), [1, "2"], "row.series.seen"),
        (("model", "extra"), 1, "extra"),
        (("subject", "baseline"), 0, "row.subject.baseline"),
        (("timing",), [], "row.timing"),
        (("key",), None, "row.key"),
    ],
)
def test_a_wrong_field_is_named(row: Row, path: tuple[str, ...], value: object, word: str) -> None:
    fields = json.loads(row.to_json())
    place = fields
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    with pytest.raises(ValueError, match=word):
        Row.from_json(json.dumps(fields))


def test_a_missing_field_is_named(row: Row) -> None:
    fields = json.loads(row.to_json())
    del fields["timing"]["tpot_worst"]
    with pytest.raises(ValueError, match="tpot_worst"):
        Row.from_json(json.dumps(fields))
