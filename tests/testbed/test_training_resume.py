from __future__ import annotations

import csv
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from training import checkpoint, provenance
from training.config import Optimizer, Recipe
from training.corpus import Corpus
from training.log import Log
from training.mixture import Batch
from training.muon import orthogonalize
from training.train import Trainer, only_one, run, sessions, where_counted

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def training_session() -> Iterator[None]:
    """Gradients on; and ``run`` takes over the signals of its process: give them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with torch.enable_grad():
        yield
    for number, handler in before.items():
        signal.signal(number, handler)


def train(corpus: Corpus, recipe: Recipe, out: Path) -> dict[str, Tensor]:
    out.mkdir(exist_ok=True)
    trainer = Trainer(recipe, corpus, CPU)
    run(trainer, out, out)
    return {name: tensor.clone() for name, tensor in trainer.tensors().items()}


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_terminated_run_goes_on_bit_identically(
    corpus: Corpus, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = train(corpus, recipe, tmp_path / "straight")
    step = Trainer.train_step

    def terminated_at_three(self: Trainer, batch: Batch) -> float:
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", terminated_at_three)
        train(corpus, recipe, tmp_path / "broken")
    _, state = checkpoint.load(checkpoint.steps(tmp_path / "broken" / "checkpoints")[-1])
    assert state["step"] == 3 and state["tokens"] == 1536
    resumed = train(corpus, recipe, tmp_path / "broken")
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_a_run_ends_when_its_time_is_over_and_goes_on_later(
    corpus: Corpus, recipe: Recipe, tmp_path: Path
) -> None:
    straight = train(corpus, recipe, tmp_path / "straight")
    out = tmp_path / "segments"
    out.mkdir()
    for steps in range(1, 7):
        trainer = Trainer(recipe, corpus, CPU)
        run(trainer, out, out, minutes=0)
        assert trainer.step == steps
    assert all(torch.equal(straight[name], t) for name, t in trainer.tensors().items())


def test_a_run_can_leave_its_schedule_after_some_tokens(
    corpus: Corpus, recipe: Recipe, tmp_path: Path
) -> None:
    straight = train(corpus, recipe, tmp_path / "straight")
    out = tmp_path / "parts"
    out.mkdir()
    for until, tokens in ((600, 1024), (1024, 1024), (9999, 3072)):
        trainer = Trainer(recipe, corpus, CPU)
        assert run(trainer, out, out, until=until)
        assert trainer.tokens == tokens
    assert all(torch.equal(straight[name], t) for name, t in trainer.tensors().items())


def test_a_run_that_was_stopped_says_so(corpus: Corpus, recipe: Recipe, tmp_path: Path) -> None:
    trainer = Trainer(recipe, corpus, CPU)
    assert not run(trainer, tmp_path, tmp_path, minutes=0)


def test_sessions_tell_commits_and_recipes_apart(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "commit", lambda: "a")
    one = {"sessions": sessions({}, recipe), "tokens": 512}
    assert one["sessions"] == [{"from_tokens": 0, "commit": "a", "recipe": recipe.digest}]
    assert sessions(one, recipe) == one["sessions"]
    monkeypatch.setattr(provenance, "commit", lambda: "b")
    other = replace(recipe, seed=2)
    assert sessions(one, other)[1:] == [{"from_tokens": 512, "commit": "b", "recipe": other.digest}]


def test_a_kill_while_the_log_is_cut_leaves_it_whole(
    corpus: Corpus, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(corpus, recipe, tmp_path)
    before = rows(tmp_path)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", killed)
        Log(tmp_path / "log.csv", 2, 0.0)
    assert rows(tmp_path) == before
    Log(tmp_path / "log.csv", 2, 0.0).close()
    assert rows(tmp_path) == before[:1]


def test_the_log_repeats_no_step_after_a_resume(
    corpus: Corpus, recipe: Recipe, tmp_path: Path
) -> None:
    train(corpus, recipe, tmp_path)
    before = rows(tmp_path)
    assert [row["step"] for row in before] == ["2", "4", "6"]
    assert before[1]["recall"] and not before[0]["recall"]
    train(corpus, recipe, tmp_path)
    assert rows(tmp_path) == before


def test_another_corpus_is_refused(corpus: Corpus, recipe: Recipe, tmp_path: Path) -> None:
    train(corpus, recipe, tmp_path)
    other = Corpus(corpus.tokenizer, corpus.books[:-1], corpus.code, corpus.held_out)
    with pytest.raises(ValueError, match="trained on other data"):
        train(other, recipe, tmp_path)


def test_two_trainings_never_share_a_folder(tmp_path: Path) -> None:
    with only_one(tmp_path):
        assert (tmp_path / "pid").read_text() == str(os.getpid())
        with pytest.raises(SystemExit, match="already runs"), only_one(tmp_path):
            pass


def test_the_last_two_checkpoints_are_kept_in_small_files(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((2**20,), float(i)) for i in range(5)}
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, tensors, {"tokens": step})
    assert [path.name for path in checkpoint.steps(tmp_path)] == ["step-00000002", "step-00000003"]
    files = list(checkpoint.steps(tmp_path)[-1].glob("*.safetensors"))
    assert len(files) == 2 and all(file.stat().st_size < 16 * 2**20 for file in files)
    loaded, state = checkpoint.load(checkpoint.steps(tmp_path)[-1])
    assert state == {"step": 3, "tokens": 3}
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_the_rate_rises_holds_falls_and_ends_at_zero() -> None:
    schedule = Optimizer(warmup=10, hold=100, cooldown=50)
    scales = [schedule.scale(tokens, 1000) for tokens in (0, 50, 400, 975, 1000)]
    assert scales == pytest.approx([0.1, 1.0, 0.5, 0.5 * (100 / 975) ** 0.5, 0.0])


@pytest.mark.parametrize(("counted", "chosen"), [(0, 1), (1, 4), (4, 4), (5, 8), (10, 10)])
def test_every_counted_position_is_chosen_and_few_shapes_occur(counted: int, chosen: int) -> None:
    weight = torch.zeros(2, 5)
    weight.view(-1)[torch.randperm(10)[:counted]] = 4.0
    indices = where_counted(weight, multiple=4)
    assert indices.numel() == chosen == indices.unique().numel()
    assert weight.flatten()[indices].count_nonzero() == counted


def test_muon_updates_are_nearly_orthogonal() -> None:
    matrices = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(0))
    for matrix in (*orthogonalize(matrices), *orthogonalize(matrices.mT)):
        values = torch.linalg.svdvals(matrix.float())
        assert values.min() > 0.5 and values.max() < 1.4
