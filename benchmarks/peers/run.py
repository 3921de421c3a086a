"""kvloom and kvpress side by side: same model, same sizes; kept entries, bytes, time per token.

    make peers            (makes .venv-peers, since kvpress needs transformers below 5.3, and runs this)

Both run as processes of their own and take turns, so that they share the machine's ups and downs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from _common import append_rows, benchmark_model, paired_ratio, provenance  # noqa: E402

METHODS = ("none", "streaming_llm", "knorm", "keydiff", "snapkv")


class Peer:
    """A worker process."""

    def __init__(self, python: str, library: str):
        self.process = subprocess.Popen(
            [python, str(HERE / "worker.py"), library],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ask(self, **order: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("=> "):
                return json.loads(line[3:])
        raise SystemExit(f"the worker ended on {order['do']!r} ({self.process.wait()})")


def compare(peers: dict[str, Peer], method: str, given: argparse.Namespace, folder: Path) -> dict:
    """One row: how many kept entries are the same, bytes and time per token of both."""
    keep = given.context if method == "none" else int(given.context * given.keep)
    paths = {name: folder / f"{name}-{method}.json" for name in peers}
    first = {
        name: peer.ask(do="prefill", method=method, keep=keep,
                       kept=None if method == "none" else str(paths[name]))
        for name, peer in peers.items()
    }  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in peers}
    for i in range(given.repeats):
        for name in list(peers)[:: 1 if i % 2 else -1]:
            times[name].append(peers[name].ask(do="decode", steps=given.steps)["seconds"])
    ratio = paired_ratio(times["kvloom"], times["kvpress"])
    row = {
        **provenance(given.threads), "method": method, "context": given.context, "kept": keep,
        "same_kept": "" if method == "none" else same(paths),
        "kvloom_bytes": first["kvloom"]["nbytes"], "kvpress_bytes": first["kvpress"]["nbytes"],
        "kvloom_ms": round(statistics.median(times["kvloom"]) * 1e3, 3),
        "kvpress_ms": round(statistics.median(times["kvpress"]) * 1e3, 3),
        "time_ratio": round(ratio[0], 4), "q25": round(ratio[1], 4), "q75": round(ratio[2], 4),
    }  # fmt: skip
    shown = ("method", "kept", "same_kept", "kvloom_bytes", "kvpress_bytes", "time_ratio")
    print({name: row[name] for name in shown}, flush=True)
    return row


def same(paths: dict[str, Path]) -> float:
    """Share of entries that both keep, over all layers and heads."""
    ours, theirs = (json.loads(paths[name].read_text()) for name in ("kvloom", "kvpress"))
    pairs = [
        (set(a), set(b))
        for x, y in zip(ours, theirs, strict=True)
        for a, b in zip(x, y, strict=True)
    ]
    return round(sum(len(a & b) for a, b in pairs) / sum(max(len(a), len(b)) for a, b in pairs), 6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", required=True, help="the interpreter that has kvpress")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--keep", type=float, default=0.25, help="share of entries kept")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--steps", type=int, default=4, help="tokens per turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--dry-run", action="store_true", help="print, but write no rows")
    given = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 4096, (given.context,), generator=generator).tolist()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        disable_progress_bar()
        benchmark_model(given.threads).save_pretrained(folder / "model")
        peers = {"kvloom": Peer(sys.executable, "kvloom"), "kvpress": Peer(given.python, "kvpress")}
        order = {"model": str(folder / "model"), "tokens": tokens, "threads": given.threads}
        versions = [peer.ask(do="load", **order)["version"] for peer in peers.values()]
        print(" and ".join(versions), flush=True)
        rows = [
            {"peer": versions[1], **compare(peers, method, given, folder)}
            for method in given.methods
        ]
    if not given.dry_run:
        append_rows("kvpress", rows)


if __name__ == "__main__":
    main()
