"""Virtual sites that add noise to 1 MB: the engine's rounds, or (`--loop`) a plain loop over the same work.

Prints one JSON object: {"ms_a_site", "update_mb", "peak_mib"}; the median over rounds, each from invitation to commit.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from benchmarks.measure import PeakMemory
from commonweight.recipe.schema import TINY_MODEL
from commonweight.train.local import LocalResult, LocalWork, Objective, Participant

UPDATE_FLOATS = 1 << 18


class Noise(Objective):
    """Adds fixed noise to the trainables: work that costs one pass over the update."""

    name = "noise"

    def work(self, participant: Participant, task: LocalWork) -> LocalResult:
        for flat in participant.trainables.values.flats.values():
            flat.add_(noise_of(flat))
        return LocalResult(num_examples=1, num_label_tokens=1, num_steps=1, loss=0.0)


_NOISE: dict[int, torch.Tensor] = {}


def noise_of(flat: torch.Tensor) -> torch.Tensor:
    if flat.numel() not in _NOISE:
        _NOISE[flat.numel()] = torch.randn(flat.numel(), generator=torch.Generator().manual_seed(0)) * 1e-3
    return _NOISE[flat.numel()]


def engine(num_sites: int, rounds: int, model: str) -> dict[str, float]:
    """Rounds of the real engine: journal, events, checks, folds and commits included."""
    from commonweight.launch import run
    from commonweight.recipe import Recipe

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        rows = ({"question": f"what is {k}", "answer": f"it is {k}"} for k in range(2 * num_sites))
        data.write_text("\n".join(json.dumps(row) for row in rows))
        recipe = Recipe.model_validate(
            {
                "name": "virtual-sites",
                "model": {"name": model, "adapter": {"r": rank_for_one_mb(model)}},
                "data": {"path": str(data), "sites": {"scheme": "iid", "count": num_sites}, "holdout": {"examples": 1}},
                "training": {"objective": "benchmarks.virtual_sites:Noise", "max_tokens": 32},
                "federation": {"rounds": rounds},
                "evaluation": {"controls": [], "samples": 0, "every": 1000, "resamples": 100},
                "output": {"keep_rounds": 1},
            }
        )
        memory = PeakMemory(os.getpid())
        metrics = run(recipe, Path(folder) / "run")
        peak = memory.stop()
    seconds = [sum(r["seconds"].values()) for r in metrics["rounds"]]
    return {
        "ms_a_site": 1000 * statistics.median(seconds) / num_sites,
        "update_mb": metrics["bytes"]["adapter"] / 1e6,
        "peak_mib": peak,
    }


def rank_for_one_mb(model: str) -> int:
    """The LoRA rank at which the model's adapter is about 1 MB."""
    from commonweight.model.adapters import attach_adapter
    from commonweight.model.base import load_base
    from commonweight.model.trainables import Trainables
    from commonweight.recipe.schema import AdapterSpec, ModelSpec

    base = load_base(ModelSpec(name=model), torch.device("cpu"))
    one = Trainables(attach_adapter(base, AdapterSpec(r=1), seed=0)).num_parameters
    return max(1, round(UPDATE_FLOATS / one))


def loop(num_sites: int, rounds: int) -> dict[str, float]:
    """The same work by hand: start from the global tensors, add noise, take the difference, fold. It checks nothing."""
    torch.set_num_threads(1)
    theta, values, delta = (torch.zeros(UPDATE_FLOATS) for _ in range(3))
    seconds = []
    for _ in range(rounds):
        began, total = time.perf_counter(), torch.zeros(UPDATE_FLOATS)
        for _ in range(num_sites):
            values.copy_(theta)
            values.add_(noise_of(values))
            torch.sub(values, theta, out=delta)
            total.add_(delta)
        theta.add_(total, alpha=1 / num_sites)
        seconds.append(time.perf_counter() - began)
    return {"ms_a_site": 1000 * statistics.median(seconds) / num_sites, "update_mb": 4 * UPDATE_FLOATS / 1e6}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loop", action="store_true")
    parser.add_argument("--model", default=TINY_MODEL)
    arguments = parser.parse_args()
    if arguments.loop:
        figures = loop(arguments.sites, arguments.rounds)
    else:
        figures = engine(arguments.sites, arguments.rounds, arguments.model)
    print(json.dumps(figures))
