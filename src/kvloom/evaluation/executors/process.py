"""Cells in worker processes: memory that one leaks or runs out of is not the others' loss."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

from kvloom.evaluation.cells import OUT_OF_MEMORY, Finished, with_fallbacks
from kvloom.evaluation.executors import Order
from kvloom.evaluation.experiment import Spec


class Worker:
    """One process, started when it is first needed and again after it has died."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._stopped = False

    def ask(self, spec: Spec, known: list[str]) -> Finished:
        """Let it measure a cell; if it dies of that, this is what came of the cell."""
        if self._stopped:
            return Finished(failed="the run was stopped")
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "kvloom.evaluation.worker"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8",
                start_new_session=True,  # Ctrl-C is for the runner, which stops its workers
            )  # fmt: skip
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(
                json.dumps({"spec": dataclasses.asdict(spec), "known": known}) + "\n"
            )
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if answer.endswith("\n"):
            return Finished.from_json(answer)
        code = process.wait()
        self._end()
        return Finished(failed=_death(code))

    def stop(self) -> None:
        """End the process, whatever it does, and start none any more."""
        self._stopped = True
        self._end()

    def _end(self) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # what it did not read any more
                pipe.close()


def _death(code: int) -> str:
    """Why a worker ended: who runs out of memory on Linux is killed without a word."""
    if code == -signal.SIGKILL:
        return f"{OUT_OF_MEMORY}, or killed by hand: the worker ended with signal 9"
    return f"the worker ended with status {code}"


def run(order: Order) -> Iterator[tuple[int, Finished]]:
    """See `Executor`; one worker unless more are asked for, since they share memory and cores."""
    waiting: queue.SimpleQueue[tuple[int, Spec] | None] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, Finished] | BaseException] = queue.SimpleQueue()
    workers = [Worker() for _ in range(min(order.workers or 1, max(1, len(order.specs))))]

    def serve(worker: Worker) -> None:
        while (item := waiting.get()) is not None:
            try:
                number, spec = item
                known = list(order.known)
                ask = with_fallbacks(spec, order.fallbacks, lambda s, k=known: worker.ask(s, k))  # type: ignore[misc]
                done.put((number, ask))
            except BaseException as error:  # a defect of ours: the runner must not wait for ever
                done.put(error)

    for item in order.specs.items():
        waiting.put(item)
    threads = [threading.Thread(target=serve, args=(w,), daemon=True) for w in workers]
    for thread in threads:
        waiting.put(None)
        thread.start()
    try:
        for _ in order.specs:
            found = done.get()
            if isinstance(found, BaseException):
                raise found
            yield found
    finally:
        for worker in workers:
            worker.stop()
        for thread in threads:
            thread.join()
