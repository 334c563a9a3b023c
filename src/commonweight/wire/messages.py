"""Control messages that came from elsewhere: everything in them that could do harm is checked before it is used.

Names become parts of paths, reasons reach terminals and logs, numbers become waits, JSON becomes memory. Each end calls
these on whatever it is sent; what passes is within the bounds below, in type and in size.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from .decode import decode
from .frames import LIMITS, Limits, parse_header
from .manifest import DIGEST, RUN, SITE, TASK, check_text, malformed
from .protocol_pb2 import (
    AuditHead,
    Bye,
    CoordinatorMessage,
    Heartbeat,
    Hello,
    Job,
    RunEnded,
    SignedJob,
    SiteMessage,
    Task,
    TaskReply,
    Welcome,
    Withdraw,
)
from .refusals import Refusal, Refused

#: what a job may hold beside the header of its initial tensors
JOB_BYTES = 2 << 20
RECIPE_BYTES = 1 << 20
CERTIFICATE_BYTES = 64 << 10
#: a task's body or its result
JSON_BYTES = 8 << 20
#: values, lists and objects in one JSON document
JSON_ITEMS = 1 << 19
MAX_SITES = MAX_TASKS = 10_000
MAX_MUST_MATCH = 64
TASK_KINDS = frozenset({"join", "train", "evaluate", "chain", "sample", "relay", "keys", "shares", "consent", "reveal"})
LONGEST_S = 366 * 86400.0

# no control characters but line ends and tabs, none that turn the direction of writing
_HARMLESS = "[^\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]"
_LINE = re.compile("[^\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]{0,200}")
_NOTE = re.compile(_HARMLESS + "{0,2000}")
_REASON = re.compile(_HARMLESS + "{0,8000}")
_VALUE = re.compile(_HARMLESS + "{0,16384}")
_ADDRESS = re.compile(r"([A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]):[0-9]{1,5}")
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _./-]{0,63}")
_WORD = re.compile(r"[a-z][a-z-]{0,31}")


def parse_job(signed: SignedJob, *, limits: Limits = LIMITS) -> Job:
    """Read a job. Neither its signature nor its recipe is checked here.

    Raises:
        Refused (malformed, too-large): it is no job, it says something that this version does not know (a demand must
            not be passed over), or something in it is outside its bounds; the reason says what.
    """
    if len(signed.job) > limits.header_bytes + JOB_BYTES:
        raise _too_large("a job", len(signed.job), limits.header_bytes + JOB_BYTES)
    if len(signed.certificate) > CERTIFICATE_BYTES:
        raise _too_large("a job's certificate", len(signed.certificate), CERTIFICATE_BYTES)
    job = decode(Job, signed.job, strict=True)
    check_text("a job's id", job.id, RUN)
    check_text("a job's name", job.name, _LINE)
    check_text("a job's kind", job.kind, _WORD)
    check_text("a job's purpose", job.purpose, _LINE)
    if len(job.recipe) > RECIPE_BYTES:
        raise _too_large("a job's recipe", len(job.recipe), RECIPE_BYTES)
    if len(job.sites) > MAX_SITES or len(set(job.sites)) != len(job.sites):
        raise malformed(f"a job for {len(job.sites)} sites, more than {MAX_SITES:,} or one of them twice")
    for site in job.sites:
        check_text("the name of a job's site", site, SITE)
    if len(job.must_match) > MAX_MUST_MATCH:
        raise malformed(f"a job with {len(job.must_match)} things that must match; {MAX_MUST_MATCH} are allowed")
    for key, value in job.must_match.items():
        check_text("what a job's sites must match", key, _KEY)
        check_text(f"the value of {key!r} that a job's sites must match", value, _VALUE)
    _check_number("a job's time", job.submitted_at, 1e11)
    parse_header(job.initial, limits)
    return job


def check_site_message(message: SiteMessage) -> None:
    """Raises Refused (malformed, too-large): what a site says on its stream is outside its bounds."""
    _check_body(message, _OF_SITES)


def check_coordinator_message(message: CoordinatorMessage) -> None:
    """Raises Refused (malformed, too-large): what a coordinator says on a stream is outside its bounds."""
    _check_body(message, _OF_COORDINATORS)


def parse_json(raw: bytes, *, max_bytes: int = JSON_BYTES) -> dict[str, Any]:
    """A JSON object from elsewhere: a task's body, its result.

    Raises:
        Refused (malformed, too-large): it is none, it holds NaN or infinity, or it is too large or too deep.
    """
    if len(raw) > max_bytes:
        raise _too_large("a JSON document", len(raw), max_bytes)
    if (items := sum(raw.count(mark) for mark in (b",", b"[", b"{"))) > JSON_ITEMS:
        raise _too_large("the number of values in a JSON document", items, JSON_ITEMS)
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise malformed(f"JSON that cannot be read: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise malformed("JSON that is not an object")
    return value


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number in JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large for a number")
    return value


def _check_body(message: SiteMessage | CoordinatorMessage, checks: Mapping[str, Callable[[Any], None]]) -> None:
    body = message.WhichOneof("body")
    if body is None:
        raise malformed("a message with nothing in it that this version knows")
    checks[body](getattr(message, body))


def _check_hello(hello: Hello) -> None:
    check_text("a site's software", hello.software, _LINE)
    if len(hello.tasks) > MAX_TASKS:
        raise _too_large("the number of tasks in hand", len(hello.tasks), MAX_TASKS)
    for task in hello.tasks:
        check_text("the id of a task in hand", task, TASK)
    if hello.HasField("audit_head"):
        _check_head(hello.audit_head)


def _check_heartbeat(heartbeat: Heartbeat) -> None:
    if len(heartbeat.progress) > MAX_TASKS:
        raise _too_large("the number of tasks in progress", len(heartbeat.progress), MAX_TASKS)
    for progress in heartbeat.progress:
        check_text("the id of a task in progress", progress.task, TASK)
        check_text("a task's progress", progress.note, _NOTE)


def _check_reply(reply: TaskReply) -> None:
    check_text("the id of a task that was answered", reply.task, TASK)
    if reply.state not in TaskReply.State.values() or reply.state == TaskReply.UNKNOWN:
        raise malformed(f"an answer in state {reply.state}")
    check_text("an answer's reason", reply.reason, _REASON)
    if len(reply.result) > JSON_BYTES:
        raise _too_large("an answer", len(reply.result), JSON_BYTES)


def _check_head(head: AuditHead) -> None:
    if len(head.hash) != 32 or len(head.signature) not in (0, 64) or head.sequence >= 1 << 63:
        raise malformed("an audit head whose hash, signature or sequence number cannot be one")


def _check_welcome(welcome: Welcome) -> None:
    check_text("the name in a welcome", welcome.name, SITE)
    _check_number("the time between heartbeats", welcome.heartbeat_s, 3600.0)
    if welcome.heartbeat_s == 0:
        raise malformed("a welcome without a time between heartbeats")
    if welcome.HasField("audit_head"):
        _check_head(welcome.audit_head)


def _check_task(task: Task) -> None:
    check_text("a task's id", task.id, TASK)
    check_text("a task's run", task.run, RUN)
    if task.kind not in TASK_KINDS:
        raise malformed(f"a task of kind {task.kind[:40]!a}")
    if task.base or task.kind != "join":
        check_text("a task's base", task.base, DIGEST)
    if len(task.body) > JSON_BYTES:
        raise _too_large("a task's body", len(task.body), JSON_BYTES)
    _check_number("a task's deadline", task.seconds_left, LONGEST_S)
    if task.relay or task.relay_address:
        check_text("a task's relay", task.relay, SITE)
        check_text("the address of a task's relay", task.relay_address, _ADDRESS)


def _check_withdraw(withdraw: Withdraw) -> None:
    check_text("the id of a task that is withdrawn", withdraw.task, TASK)
    check_text("why a task is withdrawn", withdraw.reason, _REASON)


def _check_ended(ended: RunEnded) -> None:
    check_text("the run that has ended", ended.run, RUN)
    check_text("a run's state", ended.state, _WORD)


def _check_bye(bye: Bye) -> None:
    check_text("why the stream ends", bye.reason, _REASON)


def _check_number(what: str, value: float, most: float) -> None:
    if not 0 <= value <= most:  # NaN is not
        raise malformed(f"{what} is {value}; it must lie between 0 and {most:g}")


def _too_large(what: str, size: int, limit: int) -> Refused:
    return Refused(Refusal.TOO_LARGE, f"{what} is {size:,}, more than the {limit:,} that are allowed")


_OF_SITES: dict[str, Callable[[Any], None]] = {
    "hello": _check_hello,
    "heartbeat": _check_heartbeat,
    "reply": _check_reply,
}
_OF_COORDINATORS: dict[str, Callable[[Any], None]] = {
    "welcome": _check_welcome,
    "task": _check_task,
    "withdraw": _check_withdraw,
    "heartbeat": _check_heartbeat,
    "ended": _check_ended,
    "bye": _check_bye,
    "audit_head": _check_head,
}
