"""Pickles, archives and bombs, given to everything that receives; run as a program it fails if one of them is opened.

The modules of the receiving side are imported first (torch itself imports pickle); then everything that could unpickle
is replaced by functions that raise, and Python's own audit hook watches for what holds a reference to the original.
"""

from __future__ import annotations

import gzip
import importlib
import io
import json
import pickle
import pkgutil
import sys
import zipfile
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
import torch

import commonweight
from commonweight.wire import protocol_pb2 as pb
from commonweight.wire.decode import decode
from commonweight.wire.frames import parse_header
from commonweight.wire.manifest import check_chunk, first_bad, parse_manifest
from commonweight.wire.messages import check_coordinator_message, check_site_message, parse_job, parse_json
from commonweight.wire.refusals import Refused
from tests.protocol.fuzzing import TARGETS, samples_of, sent_frames

#: packages whose modules receive what others send
RECEIVING = ("wire", "coordinator", "site", "lead", "identity")
#: ways to run what somebody else wrote
_EVENTS = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen")


class Opened(BaseException):
    """Something was unpickled, or run. No `except Exception` hides it."""


class _Command:
    """A pickle of this runs a command."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        import os

        return os.system, ("true",)


def corpus() -> dict[str, bytes]:
    """What somebody might send instead of tensors."""
    found = {f"pickle of protocol {n}": pickle.dumps({"a": [1.0]}, protocol=n) for n in range(6)}
    found["pickle of a command"] = pickle.dumps(_Command())
    found["pickle of an array"] = pickle.dumps(np.zeros(3))
    for name, new in (("torch", True), ("torch, before 1.6", False)):
        buffer = io.BytesIO()
        torch.save({"delta": torch.zeros(4), "x": _Command()}, buffer, _use_new_zipfile_serialization=new)
        found[f"file of {name}"] = buffer.getvalue()
    buffer = io.BytesIO()
    np.save(buffer, np.array([_Command()], dtype=object), allow_pickle=True)
    found["file of numpy"] = buffer.getvalue()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.pkl", bytes(16 << 20))
    found["zip of 16 MiB of zeros"] = buffer.getvalue()
    found["gzip of 16 MiB of zeros"] = gzip.compress(bytes(16 << 20))
    found["YAML of a command"] = b"!!python/object/apply:os.system ['true']"
    found["Python"] = b"__import__('os').system('true')"
    return found


def _chunk(raw: bytes) -> None:
    sent = sent_frames()[-1]
    check_chunk(sent.frame, 0, raw)
    first_bad(sent.frame, 0, raw)


RECEIVERS: dict[str, Callable[[bytes], object]] = {
    "header": parse_header,
    "manifest": lambda raw: parse_manifest(pb.SignedManifest(manifest=raw)),
    "signed manifest": lambda raw: parse_manifest(decode(pb.SignedManifest, raw)),
    "job": lambda raw: parse_job(pb.SignedJob(job=raw)),
    "chunk": _chunk,
    "site's message": lambda raw: check_site_message(decode(pb.SiteMessage, raw)),
    "coordinator's message": lambda raw: check_coordinator_message(decode(pb.CoordinatorMessage, raw)),
    "JSON": parse_json,
}


def receiving_modules() -> list[str]:
    """Every module of the receiving packages, but migrations, which are run by a library."""
    found = []
    for name in RECEIVING:
        package = importlib.import_module(f"{commonweight.__name__}.{name}")
        modules = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        found += [package.__name__, *(m.name for m in modules if ".migrations." not in m.name)]
    return found


def close_every_door() -> None:
    """From here on unpickling ends the program."""

    def opened(*_: object, **__: object) -> NoReturn:
        raise Opened("something was unpickled")

    import _pickle

    for module in (pickle, _pickle, sys.modules["pickle"]):
        for name in ("load", "loads", "Unpickler"):
            setattr(module, name, opened)
    torch.load = torch.serialization.load = opened  # type: ignore[assignment]
    torch.serialization.pickle = None  # type: ignore[attr-defined]

    def hook(event: str, _: object) -> None:
        if event in _EVENTS:
            raise Opened(event)

    sys.addaudithook(hook)


def main() -> None:
    """Print what became of each of the corpus at each receiver."""
    sent, original = corpus(), pickle.loads
    modules = receiving_modules()
    for name in modules:
        importlib.import_module(name)
    right = {name: samples_of(name) for name in TARGETS}
    close_every_door()
    for doing in (pickle.loads, torch.load, original):  # the doors are closed, or nothing here would mean anything
        try:
            doing(sent["pickle of a command"])
        except Opened:
            continue
        sys.exit(f"{doing} still opens pickles")
    for name, samples in right.items():
        for raw in samples:
            TARGETS[name].check(raw)
    refused: dict[str, dict[str, str]] = {}
    for receiver, receive in RECEIVERS.items():
        for name, raw in sent.items():
            try:
                receive(raw)
            except Refused as error:
                refused.setdefault(receiver, {})[name] = str(error.code)
    print(json.dumps({"modules": modules, "sent": list(sent), "refused": refused}))


if __name__ == "__main__":
    main()
