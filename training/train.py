"""Train the testbed model; start it again and it goes on where it was.

    python -m training.train training/recipes/cpu.toml --texts books.jsonl.xz --out DIR

``DIR`` receives ``data/`` (tokenizer and tokens, built once), ``checkpoints/``, ``log.csv`` and
``pid``. SIGTERM or SIGINT saves and leaves, and so does ``--minutes``; SIGSTOP and SIGCONT pause.
The status is 0 once the schedule is finished (or ``--until-tokens`` reached), 75 if there is more to
do, so that a chain of commands goes on only from what is complete.
One GPU is used if there is one. The schedule counts tokens, so that pauses and speed change nothing
but the time it takes.
"""

from __future__ import annotations

import argparse
import fcntl
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from training import checkpoint, config, corpus, log, provenance
from training.batches import batches
from training.mixture import Batch
from training.model import Llama
from training.muon import Muon
from training.probe import probe


class Trainer:
    """Model, optimisers, averaged weights and the place in the schedule."""

    def __init__(self, recipe: config.Recipe, data: corpus.Corpus, device: torch.device) -> None:
        self.recipe, self.data, self.device = recipe, data, device
        self.model = Llama(recipe.model, seed=recipe.seed).to(device)
        # Inductor does not pay on one CPU core (measured: +4 % at 64 tokens, -7 % at 512).
        self.forward = torch.compile(self.model) if device.type == "cuda" else self.model
        self.named = dict(self.model.named_parameters())
        opt = recipe.optimizer
        matrices = [p for n, p in self.named.items() if p.ndim == 2 and "embed" not in n]
        others = [p for n, p in self.named.items() if p.ndim == 1 or "embed" in n]
        self.muon = Muon(matrices, opt.muon_lr, opt.momentum, opt.weight_decay)
        self.adam = torch.optim.AdamW(others, opt.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.others = others
        self.average = {name: p.detach().clone() for name, p in self.named.items()}
        self.step = self.tokens = 0

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.bf16)

    def train_step(self, batch: Batch) -> float:
        """One update; returns the weighted loss of the batch."""
        tokens, weights = (torch.from_numpy(part).to(self.device) for part in batch)
        self.set_rates()
        loss = self.accumulate(tokens, weights[:, 1:])
        torch.nn.utils.clip_grad_norm_(self.others, 1.0)
        for optimizer in (self.muon, self.adam):
            optimizer.step()
            optimizer.zero_grad()
        count = weights[:, 1:].numel()
        decay = self.recipe.optimizer.ema_decay(self.tokens, count)
        torch._foreach_lerp_(list(self.average.values()), list(self.named.values()), 1 - decay)
        self.step += 1
        self.tokens += count
        return loss

    def accumulate(self, tokens: Tensor, weights: Tensor) -> float:
        """Gradients of the mean weighted loss, in parts small enough for the CPU's caches."""
        rows = max(1, self.recipe.micro_tokens // weights.shape[1])
        total, loss = weights.sum(), torch.zeros((), device=self.device)
        for part, weight in zip(tokens.split(rows), weights.split(rows), strict=True):
            counted = where_counted(weight)
            with self.autocast():
                hidden = self.forward(part[:, :-1]).flatten(0, 1)
                logits = self.model.logits(hidden.index_select(0, counted))
            labels = part[:, 1:].flatten()[counted]
            each = F.cross_entropy(logits.float(), labels, reduction="none")
            part_loss = (each * weight.flatten()[counted]).sum() / total
            part_loss.backward()
            loss += part_loss.detach()
        return loss.item()

    def set_rates(self) -> None:
        opt = self.recipe.optimizer
        scale = opt.scale(self.tokens, self.recipe.total)
        self.muon.param_groups[0]["lr"] = opt.muon_lr * scale
        self.adam.param_groups[0]["lr"] = opt.adam_lr * scale

    # --- state ---

    def tensors(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, under flat names."""
        out: dict[str, Tensor] = {f"model/{n}": p for n, p in self.named.items()}
        out |= {f"average/{n}": p for n, p in self.average.items()}
        for kind, optimizer in (("muon", self.muon), ("adam", self.adam)):
            for name, p in self.named.items():
                for key, value in optimizer.state.get(p, {}).items():
                    out[f"{kind}/{name}/{key}"] = value
        return out

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        optimizers = {"muon": self.muon, "adam": self.adam}
        for full, value in tensors.items():
            kind, name, *key = full.split("/")
            if kind == "model":
                self.named[name].copy_(value)
            elif kind == "average":
                self.average[name].copy_(value)
            else:
                # AdamW keeps its step counts on the CPU, whatever the device.
                where = "cpu" if key == ["step"] else self.device
                optimizers[kind].state[self.named[name]][key[0]] = value.to(where)
        self.step, self.tokens = state["step"], state["tokens"]


def where_counted(weight: Tensor, multiple: int = 256) -> Tensor:
    """Flat positions of non-zero weight, filled up with others to a multiple of ``multiple``.

    Of equal count, because the CPU's matrix library keeps memory and code for every shape it meets.
    """
    count = min(weight.numel(), -int(weight.count_nonzero()) // multiple * -multiple)
    return weight.flatten().sort(descending=True, stable=True).indices[: max(1, count)]


def resume(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """Load the newest checkpoint, if any; returns its state."""
    known = checkpoint.steps(folder)
    if not known:
        return {}
    tensors, state = checkpoint.load(known[-1])
    if state["corpus"] != corpus.fingerprint(trainer.data):
        raise ValueError(f"{known[-1]} was trained on other data; use another --out")
    trainer.restore(tensors, state)
    return state


def sessions(state: dict[str, Any], recipe: config.Recipe) -> list[dict[str, Any]]:
    """From how many tokens on which commit and recipe trained: one entry per change of either."""
    earlier: list[dict[str, Any]] = state.get("sessions", [])
    now = {"commit": provenance.commit(), "recipe": recipe.digest}
    if earlier and now.items() <= earlier[-1].items():
        return earlier
    return [*earlier, {"from_tokens": state.get("tokens", 0), **now}]


def run(
    trainer: Trainer,
    out: Path,
    texts: Path,
    minutes: float = math.inf,
    until: float = math.inf,
) -> bool:
    """The loop: train, log, probe, save, until the schedule, a signal or the time ends it.

    ``until`` ends it after so many tokens, at the rate that the whole schedule has there. Returns
    whether that, or the end of the schedule, was reached.
    """
    folder, recipe = out / "checkpoints", trainer.recipe
    state = resume(trainer, folder)
    history = sessions(state, recipe)
    stop = StopSignal()
    with closing(log.Log(out / "log.csv", trainer.step, state.get("seconds", 0.0))) as table:

        def save() -> None:
            meta = {
                "tokens": trainer.tokens,
                "seconds": table.seconds(),
                "seed": recipe.seed,
                "corpus": corpus.fingerprint(trainer.data),
                "versions": provenance.versions(),
                "sessions": history,
            }
            checkpoint.save(folder, trainer.step, trainer.tensors(), meta)

        saved = started = time.monotonic()
        place = trainer.step, trainer.tokens, until
        for batch in batches(trainer.data, recipe, *place, texts, out):
            length = batch[0].shape[1] - 1
            table.add(trainer.train_step(batch), length, batch[1][:, 1:].size)
            if trainer.step % recipe.log_steps == 0:
                measured = {}
                if trainer.step % recipe.probe_steps == 0:
                    with trainer.autocast():
                        measured = probe(trainer.model, trainer.data, length, trainer.device)
                table.write(trainer.step, trainer.tokens, recipe, measured)
            over = stop.asked or time.monotonic() - started > 60 * minutes
            if time.monotonic() - saved > recipe.save_seconds:
                save()
                saved = time.monotonic()
            if over:
                break
        save()
    return trainer.tokens >= min(recipe.total, until)


class StopSignal:
    """Remembers that the process was asked to end, so that a step is never cut in half."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, *_: object) -> None:
        self.asked = True


@contextmanager
def only_one(out: Path) -> Iterator[IO[str]]:
    """Hold ``out/pid`` locked: two trainings in one folder would spoil each other."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "pid").open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"a training already runs in {out} (its process id is in {out / 'pid'})")
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield handle


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--texts", type=Path, required=True, help="folder, .jsonl, .jsonl.xz, text")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=math.inf, help="save and leave after")
    parser.add_argument(
        "--until-tokens", type=int, default=math.inf, help="save and leave once so many were seen"
    )
    return parser


def main() -> None:
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    recipe = config.load(args.recipe)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Bit-identical resumption on a CPU; on a GPU it would cost speed and not hold for every kernel.
    torch.use_deterministic_algorithms(device.type == "cpu", warn_only=True)
    with only_one(args.out):
        data = corpus.prepare(args.texts, args.out / "data", recipe.model.vocab)
        trainer = Trainer(recipe, data, device)
        finished = run(trainer, args.out, args.texts, args.minutes, args.until_tokens)
    sys.exit(0 if finished else os.EX_TEMPFAIL)


if __name__ == "__main__":
    main()
