"""What a private step costs: time and memory of DP-SGD over the plain step, by opacus's ways and by forward pass size.

    python benchmarks/dp_sgd.py [--hidden H] [--layers L] [--rank R] [--tokens T] [--shortest S] [--batch B]
                                [--micro 1,4,B] [--modes …] [--json]

A random Llama with LoRA on all linear layers, one thread, a batch of B examples of S (T/2) to T tokens. Each figure is
a process of its own; a step is the gradient of a batch, for private ones with clipping, the sum and the noise.

    plain        the mean loss's gradient
    private      what runs do (`train/per_example.py`)
    packed       the same, of examples packed into sequences of T tokens, as many sequences a pass
    hooks        opacus's hooks, which take down the same
    functorch    opacus's other way to gradients of single examples: each layer's gradient, vectorised
    ghost        opacus's ghost clipping: norms without these gradients, then a second backward pass

    step, over   milliseconds of a core, the best of five; over the plain step with the same forward pass
    peak, over   MiB above the idle process, the highest so far in its life
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

MODES = ("plain", "private", "packed", "hooks", "functorch", "ghost")
BOUND, STEPS = 0.5, 5


@dataclass(frozen=True)
class Setting:
    """One figure's."""

    mode: str
    hidden: int
    layers: int
    rank: int
    tokens: int
    shortest: int
    batch: int
    micro: int


def measure(setting: Setting) -> dict[str, float]:
    """In this process: a step's seconds and the peak MiB above the idle level."""
    import torch

    torch.set_num_threads(1)
    step = _step(setting)
    idle = _memory_mib("VmRSS")
    times = []
    for _ in range(STEPS):
        began = time.process_time()
        step()
        times.append(time.process_time() - began)
    return {"step_ms": min(times) * 1e3, "peak_mib": _memory_mib("VmHWM") - idle}


def _memory_mib(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {field}")


def _step(setting: Setting) -> Callable[[], None]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from commonweight.model.trainables import Trainables
    from commonweight.privacy.example_level import NoisySteps
    from commonweight.train import batches
    from commonweight.train.loss import LanguageModel, backward
    from commonweight.train.per_example import example_gradients

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=setting.hidden,
        intermediate_size=3 * setting.hidden,
        num_hidden_layers=setting.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=setting.tokens,
    )
    lora = LoraConfig(r=setting.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(config), lora)
    model.train()
    language_model, trainables = LanguageModel(model), Trainables(model)
    tokens = _tokens(setting)
    rows, labels = [[k] for k in range(setting.batch)], int(tokens.labelled.sum())

    def micro_batches() -> Any:
        return batches.micro_batches(tokens, rows, setting.micro, torch.device("cpu"))

    def plain() -> None:
        trainables.zero_gradients()
        for batch in micro_batches():
            backward(language_model, batch, 1.0 / labels)

    if setting.mode == "plain":
        return plain
    noise = NoisySteps(BOUND, 1.0, 0.1, float(setting.batch), bytes(32))
    if setting.mode == "ghost":
        return _ghost(language_model, trainables, micro_batches, noise)
    if setting.mode in ("hooks", "functorch"):
        return _opacus(language_model, trainables, micro_batches, noise, functorch=setting.mode == "functorch")

    room, device = setting.tokens if setting.mode == "packed" else 0, torch.device("cpu")

    def private() -> None:
        trainables.zero_gradients()
        with example_gradients(language_model, trainables) as examples:
            for units in batches.unit_batches(tokens, rows, setting.micro, device, room=room):
                examples.add_clipped(units, backward, BOUND)
            trainables.gradients.copy_(noise.release(examples.total, 0))

    return private


def _opacus(
    language_model: Any, trainables: Any, micro_batches: Any, noise: Any, *, functorch: bool
) -> Callable[[], None]:
    """The same by opacus's gradients of single examples, a row each."""
    import torch
    from opacus.grad_sample import GradSampleHooks

    from commonweight.model.tensors import NamedTensors
    from commonweight.train.loss import backward

    GradSampleHooks(language_model.model, loss_reduction="sum", force_functorch=functorch)
    parameters = {name: p for name, p in language_model.model.named_parameters() if p.requires_grad}
    total = NamedTensors.zeros(trainables.values.layout, wide=True)

    def step() -> None:
        trainables.zero_gradients()
        for batch in micro_batches():
            counts = batch.labelled[:, 1:].sum(1)
            backward(language_model, batch, counts.double().reciprocal().repeat_interleave(counts))
            found = {name: parameter.grad_sample for name, parameter in parameters.items()}
            norms = torch.stack([g.flatten(1).norm(dim=1) for g in found.values()]).norm(dim=0)
            scales = (BOUND / norms).clamp(max=1.0)
            for name, parameter in parameters.items():
                total[name].add_(torch.tensordot(scales, found[name], dims=1))
                parameter.grad_sample = None
        trainables.gradients.copy_(noise.release(total, 0))
        for flat in total.flats.values():
            flat.zero_()

    return step


def _ghost(language_model: Any, trainables: Any, micro_batches: Any, noise: Any) -> Callable[[], None]:
    """One forward pass, a backward pass for the norms and another one, of losses scaled by them."""
    import torch
    from opacus.grad_sample import GradSampleHooksFastGradientClipping
    from torch.nn import functional

    from commonweight.model.tensors import NamedTensors

    hooks = GradSampleHooksFastGradientClipping(language_model.model, loss_reduction="sum", max_grad_norm=BOUND)
    total = NamedTensors.zeros(trainables.values.layout, wide=True)

    def step() -> None:
        for batch in micro_batches():
            states, targets, _ = language_model.at_labels(batch)
            counts = batch.labelled[:, 1:].sum(1)
            row = torch.arange(len(counts)).repeat_interleave(counts)
            gradient = torch.empty_like(states)
            for piece in language_model.pieces(len(targets)):
                leaf = states[piece].detach().requires_grad_()
                nats = functional.cross_entropy(language_model.logits(leaf), targets[piece], reduction="none")
                torch.autograd.backward((nats / counts[row[piece]]).sum())
                gradient[piece] = leaf.grad
            torch.autograd.backward(states, gradient, retain_graph=True)
            scale = hooks.get_clipping_coef().detach()
            trainables.zero_gradients()
            hooks.disable_hooks()
            torch.autograd.backward(states, gradient * scale[row][:, None])
            hooks.enable_hooks()
            for dtype, flat in trainables.gradients.floating():
                total.flats[dtype].add_(flat)
            trainables.zero_gradients()
        trainables.gradients.copy_(noise.release(total, 0))
        for flat in total.flats.values():
            flat.zero_()

    return step


def _tokens(setting: Setting) -> Any:
    import numpy as np

    from commonweight.data.tokens import Tokens

    draw = np.random.default_rng(0)
    lengths = draw.integers(setting.shortest, setting.tokens + 1, setting.batch)
    ids = draw.integers(0, 512, int(lengths.sum()), dtype=np.int32)
    labelled = np.concatenate([np.arange(length) > length // 4 for length in lengths])
    return Tokens(ids, labelled, np.cumsum([0, *lengths]))


def measured(setting: Setting) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--child", json.dumps(asdict(setting))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**asdict(setting), **found}


def compare(settings: list[Setting]) -> list[dict[str, Any]]:
    """Every figure, with its ratios to the plain one of the same forward pass size, which is measured beside it; of
    packed steps also the time over the padded private one."""
    rows = [measured(setting) for setting in settings]
    plain = {row["micro"]: row for row in rows if row["mode"] == "plain"}
    for row in rows:
        for figure in ("step_ms", "peak_mib"):
            row[f"{figure.split('_')[0]}_over"] = row[figure] / plain[row["micro"]][figure]
    padded = {row["micro"]: row["step_ms"] for row in rows if row["mode"] == "private"}
    for row in rows:
        if row["mode"] == "packed" and row["micro"] in padded:
            row["step_over_padded"] = row["step_ms"] / padded[row["micro"]]
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--shortest", type=int, help="Tokens of the shortest example. Default: half of --tokens.")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--micro", help="Examples a forward pass. Default: 1, half the batch, the batch.")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    if given.child:
        print(json.dumps(measure(Setting(**json.loads(given.child)))))
        return
    sizes = given.micro or f"1,{max(1, given.batch // 2)},{given.batch}"
    micros = list(dict.fromkeys(int(size) for size in sizes.split(",")))
    modes = list(dict.fromkeys(["plain", *given.modes.split(",")]))
    if not set(modes) <= set(MODES):
        parser.error(f"--modes are some of {', '.join(MODES)}")
    shortest = given.tokens // 2 if given.shortest is None else given.shortest
    model = (given.hidden, given.layers, given.rank, given.tokens, shortest, given.batch)
    rows = compare([Setting(mode, *model, micro) for micro in micros for mode in modes])
    if given.json:
        print(json.dumps({"rows": rows}))
        return
    print(f"{'step':10} {'a pass':>6} {'ms':>9} {'over plain':>10} {'peak MiB':>9} {'over plain':>10}")
    for row in rows:
        print(
            f"{row['mode']:10} {row['micro']:6} {row['step_ms']:9.1f} {row['step_over']:10.2f} "
            f"{row['peak_mib']:9.1f} {row['peak_over']:10.2f}"
        )
    for row in rows:
        if "step_over_padded" in row:
            print(f"packed over padded, {row['micro']} sequences a pass: {row['step_over_padded']:.2f}")


if __name__ == "__main__":
    main()
