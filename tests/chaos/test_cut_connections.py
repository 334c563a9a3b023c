"""The connection is cut twenty times during one transfer: what arrived is not sent again."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.federation import random_tensors
from commonweight.site.records import SiteRecords
from commonweight.wire.frames import CHUNK_BYTES

from .proxy import Proxy
from .world import World

_CUTS = 20
_CHUNKS = 24


def test_twenty_cuts_each_way(make_world: Callable[..., World]) -> None:
    size = _CHUNKS * CHUNK_BYTES
    world = make_world(theta=random_tensors(size / 2**20, tensors=2 * _CHUNKS), chunk_bytes=CHUNK_BYTES, seconds=1.0)
    world.begin()
    (site,) = world.site_names(1)
    world.enrol_sites([site])
    with Proxy(world.ports["services"]).serving() as proxy:
        world.route(site, proxy.port)
        world.begin_site(site)
        world.site_event(site, "connected")
        proxy.cut_along("down", size, _CUTS)
        run = world.start_run([site], rounds=1)
        world.training(site, 1)
        fetched, fetch_cuts, proxy.cuts = proxy.down, proxy.cuts, 0
        before = proxy.up
        proxy.cut_along("up", size, _CUTS)
        world.event(run, "update_accepted", site=site, round=1)
        pushed, push_cuts = proxy.up - before, proxy.cuts
        world.finish(run)
    world.check(run, rounds=1, everyone=[site])
    assert world.trained(site) == [1]
    records = SiteRecords(world.folder / "sites" / site / "state.sqlite")
    chunks = sum(sent.chunks for sent in records.sent(run) if sent.what == "update")
    records.close()
    overhead = size // 50 + _CUTS * 100_000  # framing; TLS, HTTP/2 and the manifest once more for each connection
    print(f"\nbody {size:,} bytes; fetched over {fetched:,}, pushed over {pushed:,}; {chunks} chunks of {_CHUNKS} sent")
    assert (fetch_cuts, push_cuts) == (_CUTS, _CUTS)
    assert size <= fetched <= size + _CUTS * CHUNK_BYTES + overhead
    assert size <= pushed <= size + _CUTS * CHUNK_BYTES + overhead
    # the site counts before it sends: of each connection the chunk that is lost, and the one that would have come next
    assert _CHUNKS <= chunks <= _CHUNKS + 2 * _CUTS
