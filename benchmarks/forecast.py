"""What `plan` foresees of a site's memory, beside what a site's work then takes: real steps in a process of their own.

    python benchmarks/forecast.py [--set KEY=VALUE …] [--hidden 512 --layers 8 --vocabulary 8000] [--json]

A Llama of the given size with random weights is trained on made-up rows of full length. `work` is the process's peak
above what it held with libraries alone, with an allocator that gives back what is freed (MALLOC_MMAP_THRESHOLD_), and
`usual_work` the same with glibc's defaults; `foreseen` the sum of `plan`'s items but the program's and the chunks'.
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
    found = _work(recipe, overrides, {"MALLOC_MMAP_THRESHOLD_": "65536"})
    usual = {f"usual_{key}": value for key, value in _work(recipe, overrides, {}).items() if key != "idle"}
    return {**found, **usual, "foreseen": foreseen, "ratio": foreseen / found["work"], "program": held["program"]}


def _work(recipe: str, overrides: Sequence[str], environment: dict[str, str]) -> dict[str, float]:
    """What a process of its own holds idle and takes for the work, in bytes, and seconds of a step."""
    command = [sys.executable, "-W", "ignore", "-c", _CHILD, recipe, *overrides]
    child = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if child.returncode:
        raise SystemExit(child.stderr)
    found: dict[str, float] = json.loads(child.stdout.splitlines()[-1])
    return found


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
    usual, longer = found["usual_work"] / found["work"], found["step_s"] / found["usual_step_s"]
    print(f"with glibc's defaults {mib['usual_work']:8.0f} MiB   {usual:.2f} of it")
    print(f"seconds of a step     {found['step_s']:8.2f}       {longer:.2f} of those with glibc's defaults")


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
