"""One site's training step against transformers.Trainer's on the same batches: time and peak memory.

    python benchmarks/local_step.py --model FOLDER [--json]

Two models: the one given (a small real one), and a random Llama of 15 M parameters with a 32,000-token vocabulary.
Each side runs in a process of its own, with one thread. Time is the median step. Memory is the peak of the resident set
over the steps, above its level when model and data were loaded (`step_mib`), and as a whole (`peak_mib`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

from benchmarks.measure import report

BATCH, TOKENS, PROMPT, STEPS, WARM_UP = 8, 192, 40, 12, 2


def make_large(folder: Path) -> None:
    """A random Llama of 15 M parameters, vocabulary 32,000."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 288, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 6}
    config = LlamaConfig(vocab_size=32000, max_position_embeddings=512, tie_word_embeddings=True, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)


def examples(vocabulary: int, full: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, labelled) of STEPS × BATCH examples: of full length, or of lengths between 96 and 192; a prompt of 40."""
    draw = np.random.default_rng(0)
    found = []
    for _ in range(STEPS * BATCH):
        length = TOKENS if full else int(draw.integers(TOKENS // 2, TOKENS + 1))
        found.append((draw.integers(3, vocabulary, length).astype(np.int32), np.arange(length) >= PROMPT))
    return found


def load(folder: str) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))


def status_mib(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def reset_peak() -> float:
    """Forget the peak so far; returns the present level in MiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return status_mib("VmRSS")


def ours(folder: str, full: bool) -> dict[str, float]:
    from commonweight.data.tokens import Tokens
    from commonweight.model.trainables import Trainables
    from commonweight.recipe.schema import TrainingSpec
    from commonweight.train.local import LocalWork, Participant, make_optimizer
    from commonweight.train.loss import LanguageModel
    from commonweight.train.sft import SupervisedFineTuning

    model = load(folder)
    tokens = Tokens.of(examples(model.config.vocab_size, full))
    spec = TrainingSpec(lr=1e-3, batch_size=BATCH, max_tokens=TOKENS)
    participant = Participant(LanguageModel(model), Trainables(model))
    task = LocalWork(tokens, spec, lr=1e-3, steps=STEPS, seed=0)
    optimizer, objective = make_optimizer(participant.trainables, spec), SupervisedFineTuning()
    model.train()
    before, seconds = reset_peak(), []
    for step in range(STEPS):
        began = time.perf_counter()
        objective._step(participant, optimizer, task, [[row] for row in range(step * BATCH, (step + 1) * BATCH)])
        seconds.append(time.perf_counter() - began)
    return figures(seconds, before)


def trainer(folder: str, full: bool) -> dict[str, float]:
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.began)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        width = max(len(row["ids"]) for row in rows)
        ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for k, row in enumerate(rows):
            n = len(row["ids"])
            ids[k, :n], mask[k, :n] = torch.from_numpy(row["ids"].astype("int64")), 1
            labels[k, PROMPT:n] = ids[k, PROMPT:n]
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}

    model, clock = load(folder), Clock()
    data = [{"ids": ids} for ids, _ in examples(model.config.vocab_size, full)]
    with tempfile.TemporaryDirectory() as output:
        arguments = TrainingArguments(
            output,
            per_device_train_batch_size=BATCH,
            max_steps=STEPS,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            optim="adamw_torch",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=not torch.cuda.is_available(),
        )
        run = InOrder(model, arguments, train_dataset=data, data_collator=collate, callbacks=[clock])
        before = reset_peak()
        run.train()
    return figures(clock.seconds, before)


def figures(seconds: list[float], before_mib: float) -> dict[str, float]:
    peak = status_mib("VmHWM")
    return {"step_s": statistics.median(seconds[WARM_UP:]), "step_mib": peak - before_mib, "peak_mib": peak}


def measured(side: str, folder: str, full: bool) -> dict[str, float]:
    command = [sys.executable, __file__, "--side", side, "--model", folder, *(["--full"] if full else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="folder of the small model; default: the built-in one")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--side", choices=["ours", "trainer"], help=argparse.SUPPRESS)
    parser.add_argument("--full", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.side:
        side = {"ours": ours, "trainer": trainer}[arguments.side]
        print(json.dumps(side(arguments.model, arguments.full)))
        return
    if arguments.model is None:
        from commonweight.model.base import TINY_FOLDER

        arguments.model = str(TINY_FOLDER)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as large:
        make_large(Path(large))
        for name, folder in (("small", arguments.model), ("15m_32k", large)):
            for kind, full in (("full", True), ("mixed", False)):
                mine, theirs = (measured(side, folder, full) for side in ("ours", "trainer"))
                label = f"{name}_{kind}"
                found |= {f"{label}_ours_{k}": v for k, v in mine.items()}
                found |= {f"{label}_trainer_{k}": v for k, v in theirs.items()}
                found |= {f"{label}_{k}_ratio": mine[k] / theirs[k] for k in mine}
    report(found, as_json=arguments.json)


if __name__ == "__main__":
    main()
