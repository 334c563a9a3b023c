"""Several global models side by side, one a cluster of sites: the channels by which their tensors travel."""

from __future__ import annotations


def channel_of(cluster: int) -> str:
    """`theta` for cluster 0; `cluster-1`, `cluster-2` … for the others."""
    return f"cluster-{cluster}" if cluster else "theta"
