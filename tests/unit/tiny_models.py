"""Random models small enough to be made inside a test, one for each thing that architectures do differently."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from commonweight.data.tokens import Tokens
from commonweight.model.adapters import attach_adapter
from commonweight.model.base import Base
from commonweight.model.trainables import Trainables
from commonweight.recipe.schema import AdapterSpec
from commonweight.train.local import Participant
from commonweight.train.loss import LanguageModel

VOCABULARY = 61
CPU = torch.device("cpu")

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "attention_dropout": 0.0,
}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 0}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, _SHAPE | {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "untied": (LlamaForCausalLM, LlamaConfig, _SHAPE | {"num_key_value_heads": 2, "tie_word_embeddings": False}),
    "conv1d": (GPT2LMHeadModel, GPT2Config, _GPT2 | _NO_DROPOUT | {"eos_token_id": 1}),
    "head bias": (PhiForCausalLM, PhiConfig, _SHAPE | {"resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "capped": (
        Gemma2ForCausalLM,
        Gemma2Config,
        _SHAPE | {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 0.5},
    ),
    "blind": (OPTForCausalLM, OPTConfig, _SHAPE | {"ffn_dim": 40, "word_embed_proj_dim": 32, "dropout": 0.0}),
}


def tiny(name: str = "llama", *, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A random model, always the same: `llama` (tied output layer), `untied`, `conv1d` (GPT-2), `head bias` (Phi),
    `capped` (Gemma 2: the output layer is not the last thing), `blind` (OPT: packed examples see each other)."""
    kind, config, shape = MODELS[name]
    torch.manual_seed(0)
    return kind(config(**(shape | changes))).to(dtype).eval()


def base_of(model: Any) -> Base:
    return Base("tiny", model.requires_grad_(False), None, sum(p.numel() for p in model.parameters()), CPU)


def participant(name: str = "llama", *, dtype: torch.dtype = torch.float64, **adapter: Any) -> Participant:
    """A tiny model with an adapter whose values are moved away from those it begins with, so that it has an effect."""
    spec = AdapterSpec(**({"r": 2, "alpha": 4} | adapter))
    model = attach_adapter(base_of(tiny(name, dtype=dtype)), spec, seed=1)
    trainables = Trainables(model)
    generator = torch.Generator().manual_seed(2)
    for flat in trainables.values.flats.values():
        flat.add_(0.05 * torch.randn(len(flat), generator=generator, dtype=flat.dtype))
    return Participant(LanguageModel(model), trainables)


def examples(*shapes: tuple[int, int], seed: int = 0) -> Tokens:
    """Random examples, each of (prompt tokens, label tokens)."""
    draw = np.random.default_rng(seed)
    return Tokens.of(
        [(draw.integers(2, VOCABULARY, p + a).astype(np.int32), np.arange(p + a) >= max(1, p)) for p, a in shapes]
    )
