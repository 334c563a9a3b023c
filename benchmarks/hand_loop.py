"""The loop that a person would write instead: federated averaging with transformers and peft, no framework.

Reads the recipe's data the same way, then trains and averages in a plain loop, and evaluates once at the end. Its last
line of output is JSON: {"macro_loss": …}.
"""

from __future__ import annotations

import argparse
import json

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from commonweight.data.sites import Site, load_sites
from commonweight.model.base import TINY_FOLDER
from commonweight.recipe.load import load_recipe
from commonweight.recipe.schema import TINY_MODEL

IGNORED = -100


def batch_of(tokens, rows):
    """(ids, labels, mask), [rows, longest] each, padded on the right."""
    width = max(len(tokens.ids_of(r)) for r in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), IGNORED)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for k, row in enumerate(rows):
        one = torch.from_numpy(tokens.ids_of(row).astype("int64"))
        known = torch.from_numpy(tokens.labelled_of(row))
        ids[k, : len(one)], mask[k, : len(one)] = one, 1
        labels[k, : len(one)] = torch.where(known, one, IGNORED)
    return ids, labels, mask


def train_site(model, trainable, site: Site, *, lr: float, batch_size: int, clip: float) -> None:
    optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=0.0)
    model.train()
    order = torch.randperm(len(site.train)).tolist()
    for start in range(0, len(order), batch_size):
        ids, labels, mask = batch_of(site.train, order[start : start + batch_size])
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels, attention_mask=mask).loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, clip)
        optimizer.step()


@torch.no_grad()
def evaluate(model, sites: list[Site], batch_size: int) -> float:
    model.eval()
    losses = []
    for site in sites:
        nats = labelled = 0
        for start in range(0, len(site.heldout), batch_size):
            rows = range(start, min(start + batch_size, len(site.heldout)))
            ids, labels, mask = batch_of(site.heldout, rows)
            count = int((labels[:, 1:] != IGNORED).sum())
            nats += float(model(input_ids=ids, labels=labels, attention_mask=mask).loss) * count
            labelled += count
        losses.append(nats / labelled)
    return sum(losses) / len(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    spec = recipe.training
    torch.manual_seed(recipe.seed)
    source = str(TINY_FOLDER) if recipe.model.name == TINY_MODEL else recipe.model.name
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    adapter = recipe.model.adapter
    config = LoraConfig(r=adapter.r, lora_alpha=adapter.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    trainable = [p for p in model.parameters() if p.requires_grad]
    sites, _ = load_sites(recipe.data, seed=recipe.seed, tokenizer=tokenizer, max_tokens=spec.max_tokens)
    rounds = recipe.federation.rounds
    for number in range(rounds):
        lr = spec.lr * (1 - 0.9 * number / max(1, rounds - 1))
        before = [p.detach().clone() for p in trainable]
        total = [torch.zeros_like(p) for p in trainable]
        weights = sum(len(site.train) for site in sites)
        for site in sites:
            for p, start in zip(trainable, before, strict=True):
                p.data.copy_(start)
            train_site(model, trainable, site, lr=lr, batch_size=spec.batch_size, clip=spec.clip_norm)
            for t, p, start in zip(total, trainable, before, strict=True):
                t.add_(p.detach() - start, alpha=len(site.train) / weights)
        for p, start, t in zip(trainable, before, total, strict=True):
            p.data.copy_(start + t)
    print(json.dumps({"macro_loss": evaluate(model, sites, spec.batch_size)}))


if __name__ == "__main__":
    main()
