"""Many light sites at one coordinator: how fast they check in, what a round costs, and how they return after a crash.

    python benchmarks/light_sites.py [--sites 500] [--processes 4] [--mb 1] [--rounds 3] [--json]

Real agents with identities, policies, records and TLS, many in a process; only what they train is made up (noise). All
attend at once. Every site takes part in every round, so that a round moves `sites` · `mb` MiB each way. Then the
coordinator is killed and started again.

    enrol_s                   identities for all sites, made on the coordinator's machine
    check_in_s                from the start of the sites' processes until every site attends
    round_s                   seconds of each round, from its opening to its commit
    coordinator_*_rss_mib     resident memory with all sites attending, and the peak afterwards
    sites_rss_mib             of all sites' processes together, and for one site
    cpu_s_a_round             CPU seconds, of the coordinator and of all sites
    back_s                    from the restarted coordinator's first answer until half, 90 % and all of the sites attend
    busiest_second            how many sites came in the fullest second: the spread of their return
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.federation import POLICY, Federation, random_tensors
from benchmarks.network_round import cpu_s, memory_mib
from commonweight.coordinator.access import AccessPart
from commonweight.coordinator.settings import load_settings
from commonweight.coordinator.store import Store
from commonweight.identity.authority import Authority
from commonweight.identity.certificates import holder_of
from commonweight.identity.folder import IdentityFolder

_FILES = 16384
_LONGEST_S = 600.0


def enrol_all(federation: Federation, names: Sequence[str]) -> None:
    """What enrolment does, for many sites at once: keys by several processes, the database in one transaction."""
    home = federation.coordinator_folder
    settings = load_settings(home)
    with ProcessPoolExecutor() as pool:
        made = list(pool.map(partial(_identity, federation.folder, settings.address), names, chunksize=16))
    add_token, redeem = AccessPart.add_token.__wrapped__, AccessPart.redeem_token.__wrapped__  # type: ignore[attr-defined]
    add_certificate = AccessPart.add_certificate.__wrapped__  # type: ignore[attr-defined]
    with Store(settings.database_url(home)) as store:

        def all_of_them(tx: Any) -> None:
            for name, key, serial, not_after in made:
                add_token(store, tx, name, name, "site", tx.now + 60, "benchmark")
                redeem(store, tx, name, key)
                add_certificate(store, tx, serial, name, not_after)

        store.database.write(all_of_them)


def _identity(folder: Path, address: str, name: str) -> tuple[str, bytes, str, float]:
    authority = Authority.load(folder / "coordinator" / "authority")
    home = folder / "sites" / name
    asked = IdentityFolder.prepare(home / "identity")
    pem = authority.issue(asked.csr, name=name, role="site", signing_key=asked.signing_key, hours=24.0)
    IdentityFolder.complete(
        home / "identity",
        name=name,
        role="site",
        certificate=pem,
        authority=authority.certificate_pem,
        address=address,
    )
    (home / "policy.yaml").write_text(POLICY)
    holder = holder_of(pem)
    return name, asked.signing_key, holder.serial, holder.not_after


def attending(port: int) -> int:
    """Sites that attend; 0 while nobody answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5) as answer:
            return int(json.loads(answer.read())["attending"])
    except OSError:
        return 0


def arrivals(port: int, sites: int, began: float) -> list[float]:
    """Seconds since `began` at which the first, second, … site was seen to attend."""
    seen: list[float] = []
    while len(seen) < sites:
        now = time.monotonic() - began
        if now > _LONGEST_S:
            raise TimeoutError(f"after {now:.0f} s {len(seen)} of {sites} sites attend")
        seen += [now] * (attending(port) - len(seen))
        time.sleep(0.05)
    return seen


def busiest_second(seen: Sequence[float]) -> int:
    return max(sum(start <= other < start + 1 for other in seen) for start in seen)


def measure(folder: Path, sites: int, processes: int, mb: float, rounds: int) -> dict[str, Any]:
    with Federation(folder) as federation:
        names = federation.site_names(sites)
        federation.make()
        began = time.monotonic()
        enrol_all(federation, names)
        result: dict[str, Any] = {"sites": sites, "processes": processes, "mb": mb}
        result["enrol_s"] = round(time.monotonic() - began, 2)

        coordinator, port = federation.start_coordinator(), federation.ports["http"]
        began = time.monotonic()
        share = -(-sites // processes)
        workers = [federation.start_site(*names[start : start + share]) for start in range(0, sites, share)]
        federation.sites += workers
        seen = arrivals(port, sites, began)
        result["check_in_s"] = round(seen[-1], 2)
        result["check_in_from_first_s"] = round(seen[-1] - seen[0], 2)
        time.sleep(2)
        idle = memory_mib(coordinator.pid, "VmRSS")
        before = cpu_s(coordinator.pid), sum(cpu_s(worker.pid) for worker in workers)
        time.sleep(6)
        after = cpu_s(coordinator.pid), sum(cpu_s(worker.pid) for worker in workers)
        result["idle_cpu_share"] = {"coordinator": (after[0] - before[0]) / 6, "sites": (after[1] - before[1]) / 6}

        Path(f"/proc/{coordinator.pid}/clear_refs").write_text("5")  # the peak counts from here
        began = time.monotonic()
        run = federation.submit(random_tensors(mb), rounds=rounds, patience_s=60.0)
        while federation.run(run)["round"] < 1 and time.monotonic() - began < _LONGEST_S:
            time.sleep(0.2)
        before = cpu_s(coordinator.pid), sum(cpu_s(worker.pid) for worker in workers)
        counted = rounds - federation.run(run)["round"]
        federation.wait(run, seconds=_LONGEST_S)
        after = cpu_s(coordinator.pid), sum(cpu_s(worker.pid) for worker in workers)
        events = federation.events(run)
        at = {(event["event"], event.get("round")): event["t"] for event in events}
        taken = [at["round_committed", n] - at["round_opened", n] for n in range(1, rounds + 1)]
        result["join_s"] = round(at["loaded", None] - at["run_started", None], 2)
        result["round_s"] = [round(seconds, 2) for seconds in taken]
        result["run_s"] = round(at["run_finished", None] - at["run_started", None], 2)
        result["coordinator_idle_rss_mib"] = round(idle, 1)
        result["coordinator_peak_rss_mib"] = round(memory_mib(coordinator.pid, "VmHWM"), 1)
        together = sum(memory_mib(worker.pid, "VmRSS") for worker in workers)
        result["sites_rss_mib"] = {"all": round(together), "one": round(together / sites, 2)}
        if counted:
            share_of = {"coordinator": after[0] - before[0], "sites": after[1] - before[1]}
            result["cpu_s_a_round"] = {who: round(seconds / counted, 2) for who, seconds in share_of.items()}

        coordinator.kill()
        coordinator.wait()
        time.sleep(3)
        federation.start_coordinator()
        back = arrivals(port, sites, time.monotonic())
        result["back_s"] = {
            "half": round(back[sites // 2], 2),
            "90 %": round(back[int(0.9 * sites) - 1], 2),
            "all": round(back[-1], 2),
        }
        result["busiest_second"] = busiest_second(back)
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=500)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--mb", type=float, default=1.0, help="MiB of the global tensors")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    given = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(_FILES, most), most))  # processes that are started inherit it
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), given.sites, given.processes, given.mb, given.rounds)
    if given.json:
        print(json.dumps(result))
        return
    for key, value in result.items():
        print(f"{key:28}{value}")


if __name__ == "__main__":
    main()
