"""A finished run's result in a folder, as `run` leaves one."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch

from ..errors import RoundError, StateError
from ..evaluate.report import read_metrics
from ..evaluate.summary import dig
from ..federation.clusters import save_models
from ..federation.folder import storage_errors, write_tensors
from ..model.adapters import save_full
from ..model.clusters import channel_of
from ..model.tensors import Layout, NamedTensors, accumulator_dtype
from ..recipe.load import parse_recipe
from ..recipe.schema import Recipe
from .client import Client
from .submit import model_bench

_ALIGN_BYTES = 64


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
    with Files(folder) as files:
        channels = client.frame(run["id"], run["base"], files)
        if adapter:
            save = _saver(parse_recipe(run["recipe"], f"the recipe of run {run['name']!r}"), channels["theta"].layout)
            clusters = _clusters(folder)
            models = {cluster: _narrow(channels[channel_of(cluster)]) for cluster in {0, *clusters.values()}}
            save_models(folder / "adapter", folder, models, clusters, save)
        else:
            write_tensors(folder / "theta.safetensors", {"theta": channels["theta"]})
    return run


class Files:
    """A `Room` in a folder: tensors in mapped files, so that a model need not fit into memory. They are gone with the
    block."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._paths: list[Path] = []

    def __call__(self, name: str, layout: Layout, *, wide: bool = False) -> NamedTensors:
        """See `Room`.

        Raises:
            StorageError: it cannot be written.
        """
        path = self.folder / f".{name}.{os.getpid()}.part"
        self._paths.append(path)
        flats, begin = {}, 0
        with storage_errors(path):
            path.write_bytes(b"")
            os.truncate(path, layout.num_wide_bytes + _ALIGN_BYTES * len(layout.numels))
            whole = torch.from_file(str(path), shared=True, size=path.stat().st_size, dtype=torch.uint8)
        for dtype, numel in layout.numels.items():
            held = accumulator_dtype(dtype) if wide else dtype
            stop = begin + numel * held.itemsize
            flats[dtype] = whole[begin:stop].view(held)
            begin = -(-stop // _ALIGN_BYTES) * _ALIGN_BYTES
        return NamedTensors(layout, flats)

    def written(self, name: str, dtype: torch.dtype, stop: int) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for path in self._paths:
            path.unlink(missing_ok=True)


def _saver(recipe: Recipe, layout: Layout) -> Callable[[NamedTensors, Path], None]:
    """What writes a model of this layout into a folder. Only to write an adapter is the base model opened.

    Raises:
        StateError: the tensors are not those of the model that is here.
        ModelError: it cannot be opened.
    """
    if recipe.model.adapter.kind == "full":
        return partial(save_full, recipe.model)
    bench = model_bench(recipe)
    if bench.theta.layout != layout:
        raise StateError(
            "the run's tensors do not fit the base model that is here",
            hint="fetch with --tensors, or use the same model",
        )
    return partial(bench.save, tokenizer=True)


def _clusters(folder: Path) -> dict[str, int]:
    """The cluster of each site, as the metrics that were fetched say; empty where there is one model, or no metrics
    yet."""
    if not (folder / "metrics.json").exists():
        return {}
    return {
        site: one["cluster"] for one in dig(read_metrics(folder), "clusters", "found") or () for site in one["sites"]
    }


def _narrow(tensors: NamedTensors) -> NamedTensors:
    if all(flat.dtype == dtype for dtype, flat in tensors.flats.items()):
        return tensors
    return NamedTensors.empty(tensors.layout).copy_(tensors)


def check_end(run: Mapping[str, Any]) -> None:
    """Raises RoundError: a run (as `Client.run` gives it) has ended without a result, and why."""
    which = f"run {run['id'][:8]} ({run['name']})"
    if run["state"] == "failed":
        raise RoundError(f"{which} failed: {run['error']}", hint=run["hint"] or "")
    if run["state"] == "cancelled":
        raise RoundError(f"{which} was cancelled by {run['cancelled_by']}", hint="submit it again for another one")
