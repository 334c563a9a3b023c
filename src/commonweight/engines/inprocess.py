"""The in-process engine: worker processes on this machine, or this process itself where there is a GPU.

Workers are forked after the base model and the data are loaded, so that both are in memory once. Tasks go out as a
line of JSON, tensors through shared memory: the global ones in one place, each update in a slot. Outcomes are handed
on in the order of the tasks; a task is sent out only if there is a slot for its update, which bounds memory at
O(workers × update) however many sites a round has. A worker that dies is replaced by a fresh fork and its task
repeated. Each worker computes with one thread, so that the bits do not depend on how many there are.
"""

from __future__ import annotations

import gc
import heapq
import json
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from ..errors import CommonweightError
from ..federation.events import Events
from ..federation.messages import (
    ChainTask,
    Completed,
    Dropped,
    EvaluateTask,
    Outcome,
    SampleTask,
    SumTask,
    Task,
    TrainTask,
)
from ..model.tensors import NamedTensors
from ..strategies.base import Strategy
from ..strategies.update import Update
from .bench import Bench
from .hand import Hand, Memory

#: a worker whose tasks take less than this gets several at once and answers them together; a message each costs more
_SHORT_TASK_S = 0.005
_TASKS_AT_ONCE = 8
#: shared memory for updates: room for several a worker, as long as they fit in this; never fewer than two a worker
_SLOTS_BYTES = 64 << 20
_KINDS = {kind.__name__: kind for kind in (TrainTask, EvaluateTask, ChainTask, SampleTask)}


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class Worker:
    """A worker process, the tasks it was given together, (index, slot), and how long those of each kind took last."""

    process: BaseProcess
    connection: Connection
    tasks: deque[tuple[int, int | None]] = field(default_factory=deque)
    sent_at: float = 0.0
    task_s: dict[type[Task], float] = field(default_factory=dict)


class InProcessEngine:
    """An engine over a workbench. Use it as a context manager: workers end with the block.

    Args:
        folder: the run's folder.
        retries: times a task is repeated after its worker died.
        weighting: what an update weighs: `examples`, `tokens` or `uniform`.
    """

    def __init__(self, bench: Bench, strategy: Strategy, folder: Path, events: Events) -> None:
        self.bench, self.strategy, self.folder, self.events = bench, strategy, folder, events
        recipe = bench.recipe
        self.retries, self.weighting = recipe.federation.retries, recipe.federation.weighting
        wanted = available_cores() if recipe.engine.workers == "auto" else recipe.engine.workers
        self.forks = bench.base.device.type == "cpu" and hasattr(os, "fork") and sys.platform != "darwin"
        self.num_workers = min(wanted, max(2, len(bench.sites))) if self.forks else 1
        self.memory = Memory.allocate(strategy, bench.theta, self._num_slots())
        self.global_tensors = self.memory.channels(
            ("theta", *strategy.broadcast_channels), self.memory.broadcast, bench.theta
        )
        self.slots = [self.memory.channels(strategy.update_channels, slot, bench.theta) for slot in self.memory.slots]
        self.workers: list[Worker] = []
        self.num_threads = torch.get_num_threads()

    def _num_slots(self) -> int:
        if not self.forks:
            return 1
        update_bytes = len(self.strategy.update_channels) * self.bench.theta.layout.arena_bytes
        return max(2, min(2 * _TASKS_AT_ONCE, _SLOTS_BYTES // update_bytes // self.num_workers)) * self.num_workers

    def __enter__(self) -> InProcessEngine:
        if self.forks:
            torch.set_num_threads(1)  # before the fork: a child must not inherit threads that it does not have
            gc.collect()
            gc.freeze()  # objects that the collector does not touch stay shared between the processes
            self.workers = [self._hire() for _ in range(self.num_workers)]
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            self._dismiss(worker)
        self.workers = []
        if self.forks:
            gc.unfreeze()
            torch.set_num_threads(self.num_threads)

    def _hire(self) -> Worker:
        ours, theirs = get_context("fork").Pipe()
        others = [worker.connection for worker in self.workers]
        process = get_context("fork").Process(
            target=self._work, args=(theirs, [ours, *others], os.getpid()), daemon=True
        )
        process.start()
        theirs.close()
        return Worker(process, ours)

    def _dismiss(self, worker: Worker) -> None:
        worker.process.kill()
        worker.process.join()
        worker.connection.close()

    def _replace(self, worker: Worker) -> None:
        self._dismiss(worker)
        self.workers.remove(worker)
        self.workers.append(self._hire())

    def broadcast(self, theta: NamedTensors, further: Mapping[str, NamedTensors]) -> None:
        for name, tensors in {"theta": theta, **further}.items():
            self.global_tensors[name].copy_(tensors)

    def run(self, tasks: Sequence[Task], *, deadline_s: float | None = None) -> Iterator[Outcome]:
        if not self.forks:
            return self._run_here(tasks, deadline_s)
        return Shift(self, tasks, deadline_s).outcomes()

    def _run_here(self, tasks: Sequence[Task], deadline_s: float | None) -> Iterator[Outcome]:
        """In this process, one after the other."""
        hand = Hand(self.bench, self.strategy, self.memory, self.folder, self._on_progress)
        ends = time.monotonic() + deadline_s if deadline_s is not None else float("inf")
        for task in tasks:
            if isinstance(task, TrainTask) and time.monotonic() > ends:
                yield Dropped(task, "the deadline passed", late=True)
            else:
                yield self.outcome(task, _carry_out(hand, task, 0), 0)

    def outcome(self, task: Task, answer: Mapping[str, Any], slot: int | None) -> Outcome:
        """An answer in plain data, with its tensors if it is an update."""
        if "error" in answer:
            return Dropped(task, str(answer["error"]))
        result = answer["result"]
        if not isinstance(task, TrainTask):
            return Completed(task, result=result)
        assert slot is not None
        weights = {"examples": result["num_examples"], "tokens": result["num_label_tokens"], "uniform": 1}
        weight = float(weights[self.weighting])
        return Completed(task, Update(task.site, task.round, self.slots[slot], weight=weight, **result))

    def _on_progress(self, fields: Mapping[str, Any]) -> None:
        self.events.emit("control_progress", **fields)

    def _work(self, connection: Connection, inherited: list[Connection], parent: int) -> None:
        """A worker's life. Ends with the connection, and with the parent."""
        for other in inherited:
            other.close()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _die_with_parent(parent)
        torch.set_num_threads(1)
        hand = Hand(self.bench, self.strategy, self.memory, self.folder, lambda f: _send(connection, {"progress": f}))
        while True:
            try:
                tasks = json.loads(connection.recv_bytes())
            except (EOFError, OSError):
                return
            answers = [_carry_out(hand, _KINDS[kind](**_tuples(fields)), slot) for kind, fields, slot in tasks]
            _send(connection, {"answers": answers})


class Shift:
    """One `run`: tasks sent out, answers gathered, outcomes handed on in order."""

    def __init__(self, engine: InProcessEngine, tasks: Sequence[Task], deadline_s: float | None) -> None:
        self.engine, self.tasks = engine, tasks
        self.ends = time.monotonic() + deadline_s if deadline_s is not None else None
        self.todo = list(range(len(tasks)))
        self.free = list(range(len(engine.slots)))
        self.done: dict[int, tuple[Outcome, int | None]] = {}
        self.deaths: dict[int, int] = {}
        self.suspects: set[int] = set()

    def outcomes(self) -> Iterator[Outcome]:
        try:
            for index in range(len(self.tasks)):
                while index not in self.done:
                    self._send_out()
                    self._gather()
                outcome, slot = self.done.pop(index)
                yield outcome
                if slot is not None:
                    self.free.append(slot)
        finally:
            for worker in [w for w in self.engine.workers if w.tasks]:
                self.engine._replace(worker)

    def _send_out(self) -> None:
        """Give the next tasks, in order, to whoever has none, as long as their updates have a slot."""
        for worker in self.engine.workers:
            chosen = [] if worker.tasks else self._choose(worker)
            if not chosen:
                continue
            worker.tasks.extend(chosen)
            worker.sent_at = time.monotonic()
            message = [[type(self.tasks[index]).__name__, vars(self.tasks[index]), slot] for index, slot in chosen]
            with suppress(OSError):  # it died while it had nothing to do: `_gather` buries it
                _send(worker.connection, message)

    def _choose(self, worker: Worker) -> list[tuple[int, int | None]]:
        """A worker's next tasks, with a slot each if they train: one, or several short ones of a kind."""
        chosen: list[tuple[int, int | None]] = []
        at_once = self._at_once(worker)
        while self.todo and len(chosen) < at_once:
            index, kind = self.todo[0], type(self.tasks[self.todo[0]])
            if kind is TrainTask and not self.free:
                break
            if chosen and (index in self.suspects or kind is not type(self.tasks[chosen[0][0]])):
                break
            heapq.heappop(self.todo)
            chosen.append((index, self.free.pop() if kind is TrainTask else None))
            if index in self.suspects:
                break
        return chosen

    def _at_once(self, worker: Worker) -> int:
        """How many tasks a worker may be given together. With a deadline one: nobody is late because of another."""
        if not self.todo or self.ends is not None:
            return 1
        short = worker.task_s.get(type(self.tasks[self.todo[0]]), 1.0) < _SHORT_TASK_S
        return min(_TASKS_AT_ONCE, max(1, len(self.todo) // len(self.engine.workers))) if short else 1

    def _gather(self) -> None:
        """Wait for answers, deaths or the deadline, and take in what there is."""
        left = None if self.ends is None else max(0.0, self.ends - time.monotonic())
        by_handle: dict[Any, Worker] = {}
        for worker in self.engine.workers:
            by_handle[worker.connection] = by_handle[worker.process.sentinel] = worker
        ready = wait(list(by_handle), timeout=left)
        for worker in {id(by_handle[handle]): by_handle[handle] for handle in ready}.values():
            if not self._take_answers(worker):
                self._bury(worker)
        if self.ends is not None and time.monotonic() >= self.ends:
            self._pass_deadline()

    def _take_answers(self, worker: Worker) -> bool:
        """Every answer that a worker has sent; False if it is dead."""
        try:
            while worker.connection.poll():
                message = json.loads(worker.connection.recv_bytes())
                if "progress" in message:
                    self.engine._on_progress(message["progress"])
                    continue
                kind = type(self.tasks[worker.tasks[0][0]])
                worker.task_s[kind] = (time.monotonic() - worker.sent_at) / len(worker.tasks)
                for answer in message["answers"]:
                    index, slot = worker.tasks.popleft()
                    self._finish(index, slot, self.engine.outcome(self.tasks[index], answer, slot))
        except (EOFError, OSError):
            return False
        return worker.process.is_alive()

    def _finish(self, index: int, slot: int | None, outcome: Outcome) -> None:
        if isinstance(outcome, Dropped) and slot is not None:
            self.free.append(slot)
            slot = None
        self.done[index] = (outcome, slot)

    def _bury(self, worker: Worker) -> None:
        """A worker died: replace it, and repeat its tasks one at a time; one that goes on killing is dropped."""
        worker.process.join()
        code = worker.process.exitcode
        self.engine.events.emit("worker_replaced", exit_code=code)
        alone = len(worker.tasks) == 1
        for index, slot in worker.tasks:
            if slot is not None:
                self.free.append(slot)
            self.suspects.add(index)
            self.deaths[index] = self.deaths.get(index, 0) + alone
            if self.deaths.get(index, 0) > self.engine.retries:
                self._finish(index, None, Dropped(self.tasks[index], _cause_of_death(code)))
            else:
                heapq.heappush(self.todo, index)
        worker.tasks.clear()
        self.engine._replace(worker)

    def _pass_deadline(self) -> None:
        """Training that is not done is late: what waits is not sent out, what runs is stopped."""
        self.ends = None
        late = [index for index in self.todo if isinstance(self.tasks[index], TrainTask)]
        self.todo = [index for index in self.todo if index not in set(late)]
        heapq.heapify(self.todo)
        for worker in list(self.engine.workers):
            running = [(i, s) for i, s in worker.tasks if isinstance(self.tasks[i], TrainTask)]
            if running:
                late += [index for index, _ in running]
                self.free += [slot for _, slot in running if slot is not None]
                worker.tasks.clear()
                self.engine._replace(worker)
        for index in late:
            self._finish(index, None, Dropped(self.tasks[index], "the deadline passed", late=True))


def _carry_out(hand: Hand, task: Task, slot: int | None) -> dict[str, Any]:
    """A task's answer in plain data. What goes wrong with one task is an answer too."""
    try:
        match task:
            case TrainTask():
                assert slot is not None
                return {"result": hand.train(task, slot)}
            case EvaluateTask():
                return {"result": hand.evaluate(task)}
            case ChainTask():
                return {"result": hand.chain(task)}
            case SampleTask():
                return {"result": hand.sample(task)}
            case SumTask():
                raise ValueError("a simulated site's part in a secure sum is not a worker's")
    except CommonweightError as error:
        return {"error": error.message + (f" ({error.hint})" if error.hint else "")}
    except Exception as error:  # a participant's code may raise anything; the round goes on without it
        return {"error": f"{type(error).__name__}: {error}"}


def _cause_of_death(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"its worker was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"its worker ended with exit code {code}"


def _send(connection: Connection, message: Any) -> None:
    connection.send_bytes(json.dumps(message).encode())


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    """JSON's lists as the tuples that tasks hold."""
    return {
        k: tuple(tuple(e) if isinstance(e, list) else e for e in v) if isinstance(v, list) else v
        for k, v in fields.items()
    }


def _die_with_parent(parent: int) -> None:
    """Ask the kernel to end this process when its parent ends (Linux); elsewhere the closed connection does, in
    time."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(0)
