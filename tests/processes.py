"""Runs in processes of their own, which may be killed at any instant.

Importing torch and transformers takes seconds, so one interpreter (`python -m tests.processes`) imports them once and
forks a process for each run. Requests and answers are lines of JSON on its standard input and output.

A process can be told to die, by SIGKILL and with no chance to tidy up, right before or after the n-th call of a place
in the code: `Death("journal.commit", "before", 2)`.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any, NoReturn

import commonweight.cli.main
import commonweight.launch
from commonweight.errors import CommonweightError
from commonweight.federation import shelf
from commonweight.recipe import Recipe

#: places to die at: (module, class or None, name); several where a function is imported by name
PLACES: dict[str, list[tuple[str, str | None, str]]] = {
    "folder.__init__": [("federation.folder", "RunFolder", "__init__")],
    "journal.__init__": [("federation.journal", "Journal", "__init__")],
    "journal.bind": [("federation.journal", "Journal", "bind")],
    "journal.commit": [("federation.journal", "Journal", "commit")],
    "journal.keep_update": [("federation.journal", "Journal", "keep_update")],
    "journal.put": [("federation.journal", "Journal", "put")],
    "journal.drop": [("federation.journal", "Journal", "drop")],
    "ledger.charge": [("federation.ledger_file", "LedgerFile", "charge")],
    "private.mean": [("federation.private_rounds", "PrivateRounds", "mean")],
    "forget_before": [("federation.folder", "RunFolder", "forget_before")],
    "forget": [("federation.shelf", "FolderShelf", "forget")],
    "write_state": [("federation.global_model", "MemoryModel", "_write")],
    "write_tensors": [
        ("federation.global_model", None, "write_tensors"),
        ("federation.shelf", None, "write_tensors"),
        ("engines.hand", None, "write_tensors"),
    ],
    "write_residual": [("federation.residuals", "Residuals", "write")],
    "move_base": [("model.moved_base", "MovedBase", "add")],
    "save_residual": [("launch", None, "save_residual")],
    "fold.add": [("strategies.base", "WeightedSum", "add"), ("strategies.individuals", "Kept", "add")],
    "round": [("federation.run", "FederatedRun", "_round")],
    "evaluation.final": [("federation.evaluation", "Evaluation", "final")],
    "save_adapter": [("engines.bench", "Bench", "save")],
    "chain.round": [("engines.chain", "Chain", "round")],
    "chain.save": [("engines.chain", "Chain", "_save")],
    "chain.result": [("engines.chain", "Chain", "result")],
    "write_json": [("launch", None, "write_json")],
    "write_report": [("launch", None, "write_report")],
    "rename": [("federation.folder", "Path", "replace")],
}


@dataclass(frozen=True)
class Death:
    """When a process dies: `when` ("before" or "after") the `nth` call of a place."""

    place: str
    when: str = "before"
    nth: int = 1


class Nursery:
    """The interpreter that forks runs; a context manager, which leaves no process behind."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def __enter__(self) -> Nursery:
        root = Path(__file__).resolve().parent.parent
        path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.processes"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root, env=environment
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _ask(self, request: dict[str, Any]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())

    def start(
        self,
        recipe: Recipe,
        output: Path,
        *,
        resume: bool = False,
        death: Death | None = None,
        keep_updates_over_s: float = 1.0,
        ledger: Path | None = None,
    ) -> int:
        """Fork a run; returns its process id. What it prints goes to the log."""
        return self._ask(
            {
                "recipe": recipe.model_dump(mode="json"),
                "output": str(output),
                "resume": resume,
                "death": asdict(death) if death else None,
                "keep_updates_over_s": keep_updates_over_s,
                "ledger": str(ledger) if ledger else None,
                "log": str(self.log),
            }
        )

    def call(self, arguments: Sequence[str], folder: Path) -> int:
        """Fork a `commonweight ARGUMENTS` in a folder, as the leader of a process group; returns its process id."""
        return self._ask({"arguments": list(arguments), "folder": str(folder), "log": str(self.log)})

    def wait(self, pid: int) -> int:
        """A process's exit code, negative for a signal."""
        return self._ask({"wait": pid})


# --- in the interpreter that forks --------------------------------------------------------------------------------


def serve() -> None:
    _import_what_a_run_imports_late()
    gc.collect()
    gc.freeze()  # what is not collected stays shared, and need not be looked at again
    living: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            living.discard(request["wait"])
            answer = _exit_code(request["wait"])
        else:
            answer = _fork(request)
            living.add(answer)
        print(answer, flush=True)
    for pid in living:  # of tests that failed before they waited
        os.kill(pid, signal.SIGKILL)


def _import_what_a_run_imports_late() -> None:
    import peft.utils.transformers_weight_conversion
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    torch.set_num_threads(1)
    assert peft.LoraConfig
    assert commonweight.registry.resolve("objective", "sft")


def _exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _fork(request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        code = _live(request)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _live(request: dict[str, Any]) -> int:
    os.setsid()
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell starts what it puts into the background deaf to it
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(log, standard)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    return _command(request) if "arguments" in request else _run(request)


def _command(request: dict[str, Any]) -> int:
    os.chdir(request["folder"])
    sys.argv = ["commonweight", *request["arguments"]]
    try:
        commonweight.cli.main.main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _run(request: dict[str, Any]) -> int:
    shelf.KEEP_UPDATES_OVER_S = request["keep_updates_over_s"]
    if request["death"]:
        _arm(Death(**request["death"]), os.getpid())
    try:
        commonweight.launch.run(
            Recipe.model_validate(request["recipe"]),
            Path(request["output"]),
            resume=request["resume"],
            ledger=Path(request["ledger"]) if request["ledger"] else None,
        )
    except CommonweightError as error:
        print(error.message, flush=True)
        return error.exit_code
    return 0


def _arm(death: Death, whom: int) -> None:
    calls = [0]
    for module_name, owner_name, name in PLACES[death.place]:
        module = importlib.import_module(f"commonweight.{module_name}")
        owner = module if owner_name is None else getattr(module, owner_name)
        setattr(owner, name, _deadly(getattr(owner, name), death, calls, partial(_die, whom)))


def _deadly(
    whole: Callable[..., Any], death: Death, calls: list[int], die: Callable[[], NoReturn]
) -> Callable[..., Any]:
    @wraps(whole)
    def call(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        now = calls[0] == death.nth
        if now and death.when == "before":
            die()
        result = whole(*args, **kwargs)
        if now:
            die()
        return result

    return call


def _die(whom: int) -> NoReturn:
    """Kill the run's process, from it or from one of its workers."""
    os.kill(whom, signal.SIGKILL)
    while True:
        time.sleep(1)


if __name__ == "__main__":
    serve()
