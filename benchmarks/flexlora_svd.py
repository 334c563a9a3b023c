"""FlexLoRA's step from the factors, against the dense way: form W = Σ pᵢBᵢAᵢ, then `torch.linalg.svd`.

    python -m benchmarks.flexlora_svd [--sites 32] [--rank 16] [--model 7b] [--layers 32]
        [--dense q_proj down_proj] [--threads N] [--json]

The shapes are those of an adapter on all seven linear modules of each of a 7B Llama's layers (out × in): four of
4096 × 4096, two of 11008 × 4096, one of 4096 × 11008. Every site's factors are random and full, so that the stacked
rank is sites × rank, the most that it can be. Rows:

    factors      the strategy's own step (`FlexLoRA.combine`) on one layer after another, each drawn afresh, untimed
    one matrix   that step on one module alone, for each that --dense names
    dense        the dense way in float32 on the same module: W, its SVD, its first r triples

Each row runs in a process of its own. Memory is the process's peak resident size (VmHWM) above what it held resident
when its inputs lay ready: with `factors`, one layer's updates of all sites. A ratio is dense over one matrix; CPU
seconds tell more than seconds on a machine that others use. Nothing is extrapolated: `factors` covers the number of
layers that it prints. Layers are alike and taken one by one, so time grows with their number and the peak does not.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import report
from commonweight.model.tensors import NamedTensors
from commonweight.strategies.base import ServerState
from commonweight.strategies.individuals import weights_of
from commonweight.strategies.lora.flexlora import FlexLoRA
from commonweight.strategies.update import Update

#: a layer's modules (out, in), and the number of layers
MODELS = {
    "7b": (
        dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (4096, 4096))
        | {"gate_proj": (11008, 4096), "up_proj": (11008, 4096), "down_proj": (4096, 11008)},
        32,
    ),
    "tiny": ({"q_proj": (64, 64), "up_proj": (176, 64)}, 2),
}


def resident_mib(field: str) -> float:
    """`VmRSS` (now) or `VmHWM` (the peak) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


class Stopwatch:
    """Seconds and CPU seconds within `with` blocks together; the largest peak memory above what was held on entry."""

    def __init__(self) -> None:
        self.seconds = self.cpu_s = self.peak_mib = 0.0

    def __enter__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        self._held, self._began = resident_mib("VmRSS"), time.perf_counter()
        self._cpu_began = time.process_time()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._began
        self.cpu_s += time.process_time() - self._cpu_began
        self.peak_mib = max(self.peak_mib, resident_mib("VmHWM") - self._held)

    def figures(self) -> dict[str, float]:
        return {"s": round(self.seconds, 3), "cpu_s": round(self.cpu_s, 3), "peak_mib": round(self.peak_mib, 1)}


def layer_of(
    modules: dict[str, tuple[int, int]], rank: int, sites: int, seed: int
) -> tuple[NamedTensors, list[Update]]:
    """Theta with B = 0, and the sites' updates, float32, for one layer; A as LoRA draws it, changes of a tenth."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (out, inner) in modules.items():
        tensors[f"{name}.lora_A.weight"] = torch.empty(rank, inner).uniform_(-1, 1, generator=draw) / inner**0.5
        tensors[f"{name}.lora_B.weight"] = torch.zeros(out, rank)
    theta, updates = NamedTensors.of(tensors), []
    for site in range(sites):
        delta = NamedTensors.empty(theta.layout)
        delta.flats[torch.float32].normal_(std=1e-3, generator=draw)
        updates.append(
            Update(f"site{site}", 1, {"delta": delta}, 10.0 + site, num_examples=1, num_label_tokens=1, num_steps=1)
        )
    return theta, updates


def factors(modules: dict[str, tuple[int, int]], rank: int, sites: int, layers: int) -> dict[str, float]:
    """The strategy's step over `layers` layers."""
    strategy, watch = FlexLoRA(), Stopwatch()
    strategy.combine(*_warm_up())
    for layer in range(layers):
        theta, updates = layer_of(modules, rank, sites, seed=layer)
        with watch:
            strategy.combine(ServerState(theta), updates)
        del theta, updates
    return watch.figures()


def dense(name: str, shape: tuple[int, int], rank: int, sites: int) -> dict[str, float]:
    """The dense way over one module; its result is held against that of the factors (`difference`, relative)."""
    theta, updates = layer_of({name: shape}, rank, sites, seed=0)
    name_a, name_b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
    torch.linalg.svd(torch.eye(8))
    watch = Stopwatch()
    with watch:
        W = torch.zeros(shape)
        for update, weight in zip(updates, weights_of(updates), strict=True):
            W.addmm_(theta[name_b] + update.delta[name_b], theta[name_a] + update.delta[name_a], alpha=weight)
        u, s, vt = torch.linalg.svd(W, full_matrices=False)
        B, A = u[:, :rank] * s[:rank], vt[:rank].clone()
    after = FlexLoRA().combine(ServerState(theta), updates).theta
    return watch.figures() | {"difference": _relative(after[name_b] @ after[name_a], B @ A)}


def _warm_up() -> tuple[ServerState, list[Update]]:
    """A small round, so that loading the linear algebra is not counted."""
    theta, updates = layer_of({"w": (64, 48)}, 4, 2, seed=0)
    return ServerState(theta), updates


def _relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def in_a_process(args: argparse.Namespace, *row: str) -> dict[str, float]:
    """One row's figures, measured in a fresh process."""
    options = [f"--{key}={getattr(args, key)}" for key in ("sites", "rank", "model", "layers", "threads")]
    command = [sys.executable, "-m", "benchmarks.flexlora_svd", *options, "--row", *row]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1], check=False)
    if found.returncode != 0:
        sys.exit(f"{' '.join(command)} ended with exit code {found.returncode}")
    figures: dict[str, float] = json.loads(found.stdout.splitlines()[-1])
    return figures


def measure_row(args: argparse.Namespace) -> dict[str, float]:
    """What a process of its own does."""
    torch.set_num_threads(args.threads)
    modules, _ = MODELS[args.model]
    kind, *name = args.row
    if kind == "factors":
        return factors(modules, args.rank, args.sites, args.layers)
    if kind == "one":
        return factors({name[0]: modules[name[0]]}, args.rank, args.sites, 1)
    return dense(name[0], modules[name[0]], args.rank, args.sites)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=32, help="sites that answered")
    parser.add_argument("--rank", type=int, default=16, help="LoRA's r")
    parser.add_argument("--model", choices=sorted(MODELS), default="7b", help="whose shapes")
    parser.add_argument("--layers", type=int, help="layers that `factors` covers; default: all of the model's")
    parser.add_argument(
        "--dense", nargs="*", default=["q_proj"], help="modules to take the dense way as well, one by one"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    parser.add_argument("--row", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    modules, num_layers = MODELS[args.model]
    args.layers = args.layers or num_layers
    if args.row:
        print(json.dumps(measure_row(args)))
        return

    figures: dict[str, Any] = {key: getattr(args, key) for key in ("model", "sites", "rank", "threads")}
    whole = in_a_process(args, "factors")
    figures |= {"layers_measured": args.layers, "layers_of_model": num_layers, "factors_s": whole["s"]}
    figures |= {"factors_cpu_s": whole["cpu_s"], "factors_peak_mib": whole["peak_mib"]}
    figures |= {"factors_s_a_layer": whole["s"] / args.layers, "factors_cpu_s_a_layer": whole["cpu_s"] / args.layers}
    for name in args.dense:
        one, other = in_a_process(args, "one", name), in_a_process(args, "dense", name)
        size = "x".join(map(str, modules[name]))
        for figure in ("s", "cpu_s", "peak_mib"):
            figures |= {f"{size}_factors_{figure}": one[figure], f"{size}_dense_{figure}": other[figure]}
            figures[f"{size}_{figure}_ratio"] = round(other[figure] / one[figure], 1) if one[figure] else float("inf")
        figures[f"{size}_difference"] = other["difference"]
    report(figures, as_json=args.json)


if __name__ == "__main__":
    main()
