"""Figures of a replica, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class Metrics:
    """Counters and gauges of one replica; names begin with `commonweight_`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.attending = Gauge(
            "commonweight_sites_attending", "Sites that attend this replica.", registry=self.registry
        )
        self.leading = Gauge("commonweight_runs_led", "Runs that this replica leads.", registry=self.registry)
        self.received = Counter("commonweight_received_bytes", "Bytes of chunks received.", registry=self.registry)
        self.sent = Counter("commonweight_sent_bytes", "Bytes of chunks sent.", registry=self.registry)
        self.uploads = Counter(
            "commonweight_uploads",
            "Updates that were accepted, or refused by kind.",
            ["outcome"],
            registry=self.registry,
        )
        self.denied = Counter(
            "commonweight_denied_calls", "Calls denied, by method.", ["method"], registry=self.registry
        )
        self.rounds = Counter(
            "commonweight_rounds", "Rounds committed or abandoned.", ["outcome"], registry=self.registry
        )
        self.round_seconds = Histogram(
            "commonweight_round_seconds",
            "Seconds from a round's opening to its commit.",
            buckets=(0.05, 0.2, 1, 5, 20, 60, 300, 1200, 3600, 14400),
            registry=self.registry,
        )
