"""What `plan` foresees of a site's memory, beside what a site's work then takes: real steps in a process of their own.

    python benchmarks/forecast.py [--set KEY=VALUE …] [--hidden 512 --layers 8 --vocabulary 8000] [--json]

A Llama of the given size with random weights is trained on made-up rows of full length. `work` is the process's peak
above what it held with libraries alone, with an allocator that gives back what is freed (glibc's by default may hold
twice as much: MALLOC_MMAP_THRESHOLD_); `foreseen` is the sum of `plan`'s items but the program's and the chunks'.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

_CHILD = """
import json, sys
from commonweight.engines.forecast import measured_step
from commonweight.recipe.load import load_recipe
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
import peft, transformers.models.llama.modeling_llama
recipe = load_recipe(sys.argv[1], sys.argv[2:])
idle = peak()
seconds = measured_step(recipe)
print(json.dumps({"idle": idle, "work": peak() - idle, "step_s": seconds}))
"""


def compared(recipe: str, overrides: Sequence[str]) -> dict[str, Any]:
    from commonweight.engines.forecast import forecast
    from commonweight.recipe.load import load_recipe

    held = forecast(load_recipe(recipe, overrides), secure=False).memory["a site"]
    foreseen = sum(size for name, size in held.items() if name not in ("program", "chunks"))
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _CHILD, recipe, *overrides], capture_output=True, text=True, env=env
    )
    if child.returncode:
        raise SystemExit(child.stderr)
    found = json.loads(child.stdout.splitlines()[-1])
    return {**found, "foreseen": foreseen, "ratio": foreseen / found["work"], "program": held["program"]}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        _make(Path(folder), given.hidden, given.layers, given.vocabulary)
        found = compared(given.recipe, [f"model.name={folder}", "engine.device=cpu", *given.overrides])
    if given.json:
        print(json.dumps(found))
        return
    mib = {name: value / 2**20 for name, value in found.items()}
    print(f"with libraries alone  {mib['idle']:8.0f} MiB   (plan: {mib['program']:.0f})")
    print(f"work above that       {mib['work']:8.0f} MiB")
    print(f"foreseen              {mib['foreseen']:8.0f} MiB   {found['ratio']:.2f} of it")


def _make(folder: Path, hidden: int, layers: int, vocabulary: int) -> None:
    """A model with random weights, and the demo's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from commonweight.model.base import TINY_FOLDER

    shape = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_attention_heads": 8}
    config = LlamaConfig(vocab_size=vocabulary, num_hidden_layers=layers, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY_FOLDER).save_pretrained(folder)


if __name__ == "__main__":
    main()
