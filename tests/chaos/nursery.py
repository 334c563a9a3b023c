"""Coordinators and sites in processes of their own, which die or stop at chosen places of the code.

Importing torch takes seconds, so one interpreter (`python -m tests.chaos.nursery`) imports everything once and forks a
process for each request. Requests and answers are lines of JSON on its standard input and output. Nothing in the
product knows of it: the forked process wraps functions before it begins.
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Death:
    """Right before or after the `nth` call of a place, a process gets a signal from itself.

    Args:
        place: `module:name` below commonweight, as `coordinator.store:Store.commit`; or, for the harness's own,
            `benchmarks.federation:NoiseWorkshop.train`.
        when: `before` or `after`. After a call that raised nothing happens, and it does not count.
        signal: SIGKILL; or SIGSTOP, after which the process may go on where it was.
    """

    place: str
    when: str = "before"
    nth: int = 1
    signal: int = signal.SIGKILL

    def __str__(self) -> str:
        verb = "" if self.signal == signal.SIGKILL else "stopped "
        return f"{verb}{self.when} {self.place.partition(':')[2]} {self.nth}"


class Process:
    """A forked process, used like a Popen."""

    def __init__(self, nursery: Nursery, pid: int) -> None:
        self.nursery, self.pid = nursery, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it lives."""
        if self.returncode is None:
            self.returncode = self.nursery.ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float = 60.0) -> int:
        ends = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > ends:
                raise TimeoutError(f"process {self.pid} lives on after {timeout} s")
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def stop(self) -> None:
        """It does nothing more until `go_on`, while its connections stay up."""
        self.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.send_signal(signal.SIGCONT)

    def wait_until_stopped(self, timeout: float = 60.0) -> None:
        ends = time.monotonic() + timeout
        while Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            if time.monotonic() > ends or self.poll() is not None:
                raise TimeoutError(f"process {self.pid} was not stopped within {timeout} s")
            time.sleep(0.01)


class Nursery:
    """The interpreter that forks; a context manager, which leaves no process behind."""

    def __enter__(self) -> Nursery:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.chaos.nursery"]
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            return json.loads(self._process.stdout.readline())

    def start(
        self, arguments: Sequence[str], log: Path, deaths: Sequence[Death] = (), *, keep_after_s: float = 1.0
    ) -> Process:
        """Fork a `python -m benchmarks.federation ARGUMENTS`, or a site with the real workshop: `recipe-site FOLDER`.

        Args:
            keep_after_s: as of `Agent`.
        """
        request = {
            "arguments": list(arguments),
            "log": str(log),
            "deaths": [asdict(death) for death in deaths],
            "keep_after_s": keep_after_s,
        }
        return Process(self, self.ask(request))


# --- in the interpreter that forks --------------------------------------------------------------------------------


def serve() -> None:
    _import_what_is_needed()
    gc.collect()
    gc.freeze()  # what is not collected stays shared, and need not be looked at again
    living: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            answer = _exit_code(request["poll"])
            if answer is not None:
                living.discard(request["poll"])
        else:
            answer = _fork(request)
            living.add(answer)
        print(json.dumps(answer), flush=True)
    for pid in living:
        os.kill(pid, signal.SIGKILL)


def _import_what_is_needed() -> None:
    import peft.utils.transformers_weight_conversion
    import torch
    import transformers.models.llama.modeling_llama

    import benchmarks.federation
    import commonweight.site.workshop
    from commonweight.registry import resolve

    torch.set_num_threads(1)
    assert peft.LoraConfig
    assert transformers.LlamaForCausalLM
    assert benchmarks.federation
    assert commonweight.site.workshop
    assert resolve("objective", "sft")
    assert resolve("strategy", "fedavg")


def _exit_code(pid: int) -> int | None:
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def _fork(request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        _live(request)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _live(request: dict[str, Any]) -> None:
    import benchmarks.federation as federation

    os.setsid()
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(log, standard)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    federation.Agent = functools.partial(federation.Agent, keep_after_s=request["keep_after_s"])  # type: ignore[misc]
    for death in request["deaths"]:
        arm(Death(**death))
    what, *rest = request["arguments"]
    if what == "recipe-site":
        from .recipe_site import run

        run(Path(rest[0]), keep_after_s=request["keep_after_s"])
        return
    sys.argv = ["federation", *request["arguments"]]
    federation.main()


def arm(death: Death) -> None:
    """Make this process die as told."""
    module_name, _, path = death.place.partition(":")
    ours = not module_name.startswith("benchmarks.")
    owner: Any = importlib.import_module(f"commonweight.{module_name}" if ours else module_name)
    *owners, name = path.split(".")
    for part in owners:
        owner = getattr(owner, part)
    setattr(owner, name, _deadly(getattr(owner, name), death))


def _deadly(whole: Callable[..., Any], death: Death) -> Callable[..., Any]:
    calls, lock = [0], threading.Lock()

    def now() -> bool:
        with lock:
            calls[0] += 1
            return calls[0] == death.nth

    @functools.wraps(whole)
    def call(*args: Any, **kwargs: Any) -> Any:
        if death.when == "before" and now():
            _signal(death.signal)
        result = whole(*args, **kwargs)
        if death.when == "after" and now():
            _signal(death.signal)
        return result

    return call


def _signal(number: int) -> None:
    os.kill(os.getpid(), number)
    while number == signal.SIGKILL:
        time.sleep(1)


if __name__ == "__main__":
    from tests.chaos import nursery  # under its own name, so that what is forked has these very classes

    nursery.serve()
