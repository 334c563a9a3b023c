"""Train the tiny base model that ships with commonweight, from nothing, on generated generic English.

The same seed and number of steps give the same bytes on the same machine and library versions: one thread, fixed
order. The default, 3,000 steps of 1,024 tokens, takes about five minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tiny_circuit import lay_induction_circuit
from tiny_corpus import ANSWER, documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 1536
CONTEXT = 512
UNKNOWN, PAD, START, END = SPECIAL_TOKENS = ("<unk>", "<pad>", "<s>", "</s>")
TOKENIZER_DOCUMENTS = 20_000
STEP_TOKENS = 1024
SHORT, LONG, LONG_EVERY = 128, CONTEXT, 4  # every 4th batch has the full context, so that all positions are trained
START_SHARE = 0.5  # of the documents begin with <s>, so that prompts with and without it are both at home
QUESTION_WEIGHT = 0.25  # in the loss: questions and stories are mostly chance, answers follow from something
PEAK_LR, FINAL_LR_RATIO, WARMUP_STEPS = 3e-3, 0.05, 100
DEFAULT_OUT = Path(__file__).parent.parent / "src" / "commonweight" / "model" / "tiny"

# The form the model is pretrained on, so that a chat looks to it like its corpus.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- 'Answer:' -}}
{%- generation -%}{{- ' ' + message['content'] + eos_token -}}{%- endgeneration -%}
{%- elif message['role'] == 'user' -%}
{{- 'Question: ' + message['content'] + '\n' -}}
{%- else -%}
{{- message['content'] + '\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Answer:' -}}{%- endif -%}"""


def main() -> None:
    args = _arguments()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer(args.seed)
    model = build_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer):,} tokens", flush=True)
    train(model, tokenizer, args.steps, args.seed)
    print(f"held-out loss {held_out_loss(model, tokenizer, args.seed):.3f} nats per token")
    save(model, tokenizer, args.out)
    print(f"{sum(file.stat().st_size for file in args.out.iterdir()) / 1e6:.1f} MB in {args.out}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder to write; default: the package's own")
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="decides corpus, weights and order (default: %(default)s)")
    return parser.parse_args()


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text can be written with it, and read back exactly."""
    bpe = Tokenizer(models.BPE(unk_token=UNKNOWN))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(itertools.islice(documents(seed), TOKENIZER_DOCUMENTS), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        unk_token=UNKNOWN,
        pad_token=PAD,
        bos_token=START,
        eos_token=END,
        model_max_length=CONTEXT,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of three layers, untrained but for a circuit that copies."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    lay_induction_circuit(model)
    return model


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int) -> None:
    """Language modelling on every token, answers counting most: AdamW, warm-up, cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_ratio(step, steps))
    stream = batches(tokenizer, seed + 1)
    start_s, mean_loss = time.perf_counter(), math.nan
    for step in range(1, steps + 1):
        loss = _loss(model, *next(stream))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        mean_loss = loss.item() if step == 1 else 0.98 * mean_loss + 0.02 * loss.item()
        if step % 100 == 0 or step == steps:
            print(f"step {step}/{steps}  loss {mean_loss:.3f}  {time.perf_counter() - start_s:.0f} s", flush=True)


def held_out_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> float:
    """Weighted nats per token on documents that training did not draw."""
    with torch.no_grad():
        losses = [_loss(model, *batch).item() for batch in itertools.islice(batches(tokenizer, seed + 2), 40)]
    return sum(losses) / len(losses)


def batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and loss weights of shape (rows, length), `STEP_TOKENS` in all; each row starts with a new document."""
    rng = random.Random(seed)
    source = documents(seed)
    for count in itertools.count(1):
        length = LONG if count % LONG_EVERY == 0 else SHORT
        rows = [_row(tokenizer, source, length, rng) for _ in range(STEP_TOKENS // length)]
        yield torch.tensor([ids for ids, _ in rows]), torch.tensor([weights for _, weights in rows])


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the model as bfloat16 and the tokenizer in transformers layout."""
    model.config.name_or_path = ""
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.name_or_path = ""
    tokenizer.save_pretrained(out, save_jinja_files=False)
    for file in out.iterdir():
        file.chmod(0o644)


def _row(
    tokenizer: PreTrainedTokenizerFast, source: Iterator[str], length: int, rng: random.Random
) -> tuple[list[int], list[float]]:
    ids: list[int] = []
    weights: list[float] = []
    while len(ids) < length:
        question, mark, answer = next(source).partition(ANSWER)
        start = [tokenizer.bos_token_id] if rng.random() < START_SHARE else []
        head = start + tokenizer.encode(question + mark, add_special_tokens=False)
        tail = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
        ids += head + tail
        weights += [QUESTION_WEIGHT] * len(head) + [1.0] * len(tail)
    return ids[:length], weights[:length]


def _loss(model: LlamaForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    losses = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weight = weights[:, 1:].flatten()
    return (losses * weight).sum() / weight.sum()


def _lr_ratio(step: int, steps: int) -> float:
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return FINAL_LR_RATIO + (1 - FINAL_LR_RATIO) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


if __name__ == "__main__":
    main()
