"""No process ever holds a whole model: real coordinator and sites, and what memory they take on of their own."""

from __future__ import annotations

import json
import time
import urllib.request
from pathlib import Path

from benchmarks.big_model import OwnMemory, decoder, model
from benchmarks.federation import Federation
from commonweight.site.outbox import Desk

#: of the model, and what a process may take on above its idle level
MODEL_MIB, LIMIT_MIB = 224, 160


def test_a_model_goes_to_a_site_and_back_and_is_held_by_nobody(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "model")
    theta = model(decoder(MODEL_MIB << 20), desk)
    assert theta.layout.num_bytes > 1.2 * (LIMIT_MIB << 20)
    settings = {"transfers_at_once": 2}
    with Federation(tmp_path / "federation", settings=settings, large=True) as federation:
        pids = {"coordinator": federation.start_coordinator().pid, "site": federation.start_sites(1)[0].pid}
        url = f"http://127.0.0.1:{federation.ports['http']}/healthz"
        ends = time.monotonic() + 120
        while not json.loads(urllib.request.urlopen(url).read())["attending"]:
            assert time.monotonic() < ends
            time.sleep(0.05)
        memory = OwnMemory(pids)
        for compression in ("none", {"round": "sign"}):
            run = federation.submit(theta, rounds=1, chunk_bytes=1 << 18, compression=compression)
            assert federation.wait(run)["round"] == 1
        found = memory.stop()
    desk.clear()
    assert max(found.values()) < LIMIT_MIB, found
