"""What the in-process engine costs over a hand-written loop that does the same training.

    python benchmarks/engine_overhead.py --recipe recipes/medquad.yaml --set data.path=… --set model.name=… [--json]
    python benchmarks/engine_overhead.py --trivial [--json]

The first runs the federated arm alone four times in turn, each from start of process to final evaluation: a loop with
two torch threads, one with one, the engine with `workers: auto` and with one worker. The second gives 1,000
virtual sites nothing to do but to add noise to 1 MB, against a loop that does just that.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.measure import Measured, measure, report

FEDERATED_ONLY = ["evaluation.controls=[]", "evaluation.samples=0", "evaluation.every=1000000"]


def real(recipe: str, overrides: list[str]) -> dict[str, Any]:
    """Ratios of the engine over the loop on a real recipe."""
    sets = [part for o in overrides for part in ("--set", o)]
    by_hand = [sys.executable, "benchmarks/hand_loop.py", recipe, *sets, "--threads"]
    loops = {threads: measure([*by_hand, str(threads)]) for threads in (2, 1)}
    auto, one = (_engine(recipe, overrides, workers) for workers in ("auto", "1"))
    same = auto.result["adapter"]["digest"] == one.result["adapter"]["digest"]
    return {
        "loop_two_threads_s": loops[2].seconds,
        "loop_one_thread_s": loops[1].seconds,
        "engine_auto_s": auto.seconds,
        "engine_one_worker_s": one.seconds,
        "auto_over_two_thread_loop": auto.seconds / loops[2].seconds,
        "one_worker_over_one_thread_loop": one.seconds / loops[1].seconds,
        "loop_one_thread_cpu_s": loops[1].cpu_s,
        "engine_one_worker_cpu_s": one.cpu_s,
        "one_worker_cpu_over_one_thread_loop": one.cpu_s / loops[1].cpu_s,
        "loop_peak_mib": loops[1].peak_mib,
        "engine_auto_peak_mib": auto.peak_mib,
        "engine_one_worker_peak_mib": one.peak_mib,
        "auto_memory_over_loop": auto.peak_mib / loops[1].peak_mib,
        "one_worker_memory_over_loop": one.peak_mib / loops[1].peak_mib,
        "loop_macro_loss": loops[1].result["macro_loss"],
        "engine_macro_loss": auto.result["arms"]["federated"]["macro_loss"],
        "adapters_bit_identical": same,
    }


def _engine(recipe: str, overrides: list[str], workers: str) -> Measured:
    sets = [*overrides, *FEDERATED_ONLY, f"engine.workers={workers}"]
    with tempfile.TemporaryDirectory() as folder:
        arguments = [part for o in sets for part in ("--set", o)]
        command = [str(Path(sys.executable).with_name("commonweight")), "run", recipe, *arguments]
        return measure([*command, "-o", f"{folder}/run", "--json"])


def trivial(sites: int) -> dict[str, Any]:
    """Milliseconds a virtual site, and how memory grows with their number."""
    command = [sys.executable, "benchmarks/virtual_sites.py"]
    loop = measure([*command, "--loop", "--sites", str(sites)]).result
    many = measure([*command, "--sites", str(sites)]).result
    few = measure([*command, "--sites", "10"]).result
    return {
        "sites": sites,
        "update_mb": many["update_mb"],
        "loop_ms_a_site": loop["ms_a_site"],
        "engine_ms_a_site": many["ms_a_site"],
        "engine_over_loop": many["ms_a_site"] / loop["ms_a_site"],
        "peak_mib_10_sites": few["peak_mib"],
        f"peak_mib_{sites}_sites": many["peak_mib"],
        "memory_growth": many["peak_mib"] / few["peak_mib"] - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo", help="a recipe whose model is a folder or the built-in one")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--trivial", action="store_true", help="virtual sites with nothing to do")
    parser.add_argument("--sites", type=int, default=1000)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    figures = trivial(arguments.sites) if arguments.trivial else real(arguments.recipe, arguments.overrides)
    report(figures, as_json=arguments.json)


if __name__ == "__main__":
    main()
