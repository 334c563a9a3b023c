"""A finished run's result in a folder, as `run` leaves one."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import RoundError, StateError
from ..evaluate.report import read_metrics
from ..evaluate.summary import dig
from ..federation.clusters import save_models
from ..federation.folder import storage_errors, write_tensors
from ..model.clusters import channel_of
from ..model.tensors import NamedTensors
from ..recipe.load import parse_recipe
from .client import Client
from .submit import model_bench


def fetch(client: Client, which: str, folder: Path, *, adapter: bool = True) -> dict[str, Any]:
    """Bring a run's files, and its latest global tensors as an adapter that peft opens.

    Args:
        folder: where to; made if need be.
        adapter: open the base model to write the adapter's folder; otherwise the tensors alone (`theta.safetensors`).

    Returns:
        The run as `Client.run` gives it.

    Raises:
        StateError: the run has no result yet.
        ModelError: the recipe's base model cannot be opened here.
    """
    run = client.run(which)
    if not run["base"]:
        raise StateError(
            f"run {run['name']!r} has no committed round yet: it is {run['state']}", hint="wait for it", retry=True
        )
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name in run["files"]:
        client.file(run["id"], name, folder / Path(name).name)
    channels = client.frame(run["id"], run["base"])
    theta = channels["theta"]
    if adapter:
        bench = model_bench(parse_recipe(run["recipe"], f"the recipe of run {run['name']!r}"))
        if bench.theta.layout != theta.layout:
            raise StateError(
                "the run's tensors do not fit the base model that is here",
                hint="fetch with --tensors, or use the same model",
            )
        clusters = _clusters(folder)
        models = {cluster: _narrow(channels[channel_of(cluster)]) for cluster in {0, *clusters.values()}}
        save_models(folder / "adapter", folder, models, clusters, partial(bench.save, tokenizer=True))
    else:
        write_tensors(folder / "theta.safetensors", {"theta": theta})
    return run


def _clusters(folder: Path) -> dict[str, int]:
    """The cluster of each site, as the metrics that were fetched say; empty where there is one model, or no metrics
    yet."""
    if not (folder / "metrics.json").exists():
        return {}
    return {
        site: one["cluster"] for one in dig(read_metrics(folder), "clusters", "found") or () for site in one["sites"]
    }


def _narrow(tensors: NamedTensors) -> NamedTensors:
    return NamedTensors.empty(tensors.layout).copy_(tensors)


def check_end(run: Mapping[str, Any]) -> None:
    """Raises RoundError: a run (as `Client.run` gives it) has ended without a result, and why."""
    which = f"run {run['id'][:8]} ({run['name']})"
    if run["state"] == "failed":
        raise RoundError(f"{which} failed: {run['error']}", hint=run["hint"] or "")
    if run["state"] == "cancelled":
        raise RoundError(f"{which} was cancelled by {run['cancelled_by']}", hint="submit it again for another one")
