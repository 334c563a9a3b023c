"""What noise that sites add costs a site, beside the encoding and the masks that a secure sum takes anyway.

    python benchmarks/distributed_noise.py [--sites 10] [--params-m 4] [--noise-multiplier 6] [--repeat 3] [--json]

One core, one site's work on one round, all in this process and this run.

    encode_s           rounding an update to the ring, without noise
    masks_s            the masks of a round of so many sites
    round_s            rounding by chance, with the check of the norm
    noise_s            drawing the discrete Gaussian and adding it
    noise_s_per_m      of these, for a million elements
    over_masked        round_s + noise_s to encode_s + masks_s: the price of noise in units of a masked row
    over_gaussian      noise_s to the seconds in which `GaussianNoise` is added to as many elements
    steps              between 0 and the clipping norm
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from commonweight.errors import RecipeError
from commonweight.privacy.discrete_gaussian import DiscreteGaussian
from commonweight.privacy.distributed import DistributedNoise
from commonweight.privacy.noise import GaussianNoise, new_key
from commonweight.privacy.secure_aggregation.fixed_point import FixedPoint
from commonweight.privacy.secure_aggregation.masks import Expander

_STRETCH = 1 << 18


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measured(num_sites: int, num_params: int, z: float) -> dict[str, float]:
    """One round's figures."""
    update = torch.randn(num_params, generator=torch.Generator().manual_seed(0))
    update /= update.double().norm()
    row, bound = np.empty(num_params, dtype=np.uint32), 1.0
    code = DistributedNoise.of(bound=bound, noise_multiplier=z, num_sites=num_sites, colluding=0.0, length=num_params)
    stretches = [(start, update[start : start + _STRETCH]) for start in range(0, num_params, _STRETCH)]
    expander, fixed = Expander(), FixedPoint(bound, num_sites, toward_zero=True)

    def masks() -> None:
        for site in range(num_sites):  # its own, and one for each other site
            expander.add(row, site.to_bytes(16, "big"))

    whole = seconds(lambda: code.encode(stretches, row, new_key()))
    noise = seconds(lambda: DiscreteGaussian(new_key(), code.bits).add_(row))
    return {
        "encode_s": seconds(lambda: fixed.encode(update.numpy(), row)),
        "masks_s": seconds(masks),
        "round_s": whole - noise,
        "noise_s": noise,
        "gaussian_s": seconds(lambda: GaussianNoise(new_key()).add_(update, 1e-9, number=0)),
        "steps": code.levels,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=10)
    parser.add_argument("--params-m", type=float, default=4.0, help="Millions of parameters.")
    parser.add_argument("--noise-multiplier", type=float, default=6.0, metavar="Z")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    num_params = int(given.params_m * 1e6)
    if num_params < 1 or given.repeat < 1 or given.sites < 1 or given.noise_multiplier <= 0:
        parser.error("--sites, --params-m, --noise-multiplier and --repeat must be positive")
    torch.set_num_threads(1)
    try:
        runs = [measured(given.sites, num_params, given.noise_multiplier) for _ in range(given.repeat)]
    except RecipeError as error:
        parser.error(error.message)
    figures: dict[str, Any] = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    added = figures["round_s"] + figures["noise_s"]
    figures["noise_s_per_m"] = added / num_params * 1e6
    figures["over_masked"] = added / (figures["encode_s"] + figures["masks_s"])
    figures["over_gaussian"] = figures["noise_s"] / figures["gaussian_s"]
    figures |= {"sites": given.sites, "params": num_params, "noise_multiplier": given.noise_multiplier}
    if given.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:18} {value:.6g}" if isinstance(value, float) else f"{name:18} {value}")


if __name__ == "__main__":
    main()
