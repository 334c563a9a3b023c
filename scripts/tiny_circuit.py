"""Start the tiny model with an induction circuit laid down, so that it can copy before it has learned anything.

Copying from the context ("… Vera Holt … Vera" → "Holt") takes two attention heads in two layers: one that brings to
each position the token before it, and one that looks for the position whose previous token is the present token, and
repeats what stands there (Olsson et al. 2022, "In-context Learning and Induction Heads"). From random weights these
heads had not formed after 1,500 steps of 1,024 tokens; laid down by hand they repeat 60 % of random tokens at step 0,
and training goes on from there.
"""

from __future__ import annotations

import math

import torch
from transformers import LlamaForCausalLM

EMBEDDING_STD = 0.05
CONSTANT = 4.0  # of EMBEDDING_STD: dimension 0 is the same in every token, which lets a head ignore content
SLOT = 32  # the last dimensions, empty in the embedding: the previous token is written there
PREVIOUS_SHARPNESS = 8.0
PREVIOUS_PAIRS = 8  # rotary pairs that measure the distance of one token; the slower ones cannot
MATCH_SHARPNESS = 6.0
FIRST_SLOW_PAIR = 6  # rotary pairs from here on turn too little over a sentence to disturb a comparison of tokens
COPY_GAIN = 6.0


def lay_induction_circuit(model: LlamaForCausalLM) -> None:
    """Overwrite the embedding, one head of layer 0 and two heads of layer 1. Needs heads of `SLOT` dimensions.

    The draws come from torch's global generator, so that its seed decides them.
    """
    with torch.no_grad():
        basis = _embed(model.model.embed_tokens.weight)
        theta = model.config.rope_parameters["rope_theta"]
        _previous_token_head(model.model.layers[0].self_attn, basis[:SLOT], theta)
        for head in range(2):
            _induction_head(model.model.layers[1].self_attn, head, basis)


def _embed(table_VD: torch.Tensor) -> torch.Tensor:
    """Fill the embedding; return an orthonormal basis of the dimensions that tell tokens apart, one a row."""
    width = table_VD.shape[1]
    content = width - SLOT - 1
    table_VD.normal_(0, EMBEDDING_STD)
    table_VD[:, 0] = CONSTANT * EMBEDDING_STD
    table_VD[:, -SLOT:] = 0
    basis_CD = torch.zeros(content, width)
    basis_CD[:, 1 : 1 + content] = torch.linalg.qr(torch.randn(content, content))[0]
    return basis_CD


def _previous_token_head(attention: torch.nn.Module, seen_SD: torch.Tensor, theta: float) -> None:
    """Head 0: attention by distance alone, highest at one token back; writes what it `seen` there into the slot."""
    width, half = seen_SD.shape[1], SLOT // 2
    turn = theta ** (-torch.arange(PREVIOUS_PAIRS) / half)  # radians a position, of each rotary pair
    constant = CONSTANT / math.sqrt((CONSTANT**2 + width - SLOT - 1) / width)  # dimension 0 after RMSNorm
    strength = math.sqrt(PREVIOUS_SHARPNESS * math.sqrt(SLOT)) / constant
    q, k = attention.q_proj.weight, attention.k_proj.weight
    q[:SLOT], k[:SLOT] = 0, 0
    k[:PREVIOUS_PAIRS, 0] = strength
    q[:PREVIOUS_PAIRS, 0] = strength * torch.cos(turn)
    q[half : half + PREVIOUS_PAIRS, 0] = -strength * torch.sin(turn)
    attention.v_proj.weight[:SLOT] = seen_SD
    attention.o_proj.weight[:, :SLOT] = 0
    attention.o_proj.weight[-SLOT:, :SLOT] = EMBEDDING_STD * torch.eye(SLOT)


def _induction_head(attention: torch.nn.Module, head: int, basis_CD: torch.Tensor) -> None:
    """Compare the present token with each position's slot; copy the token of the best one. Each head, other parts."""
    slow = torch.tensor([i for i in range(SLOT) if i % (SLOT // 2) >= FIRST_SLOW_PAIR])
    compared = torch.arange(len(slow)) + head * (SLOT - len(slow))
    copied_SD = basis_CD[head * SLOT : (head + 1) * SLOT]
    rows = slice(head * SLOT, (head + 1) * SLOT)
    q, k = attention.q_proj.weight, attention.k_proj.weight
    q[rows], k[rows] = 0, 0
    q[head * SLOT + slow] = math.sqrt(MATCH_SHARPNESS) * basis_CD[compared]
    k[head * SLOT + slow, k.shape[1] - SLOT + compared] = math.sqrt(MATCH_SHARPNESS)
    attention.v_proj.weight[rows] = copied_SD
    attention.o_proj.weight[:, rows] = COPY_GAIN * EMBEDDING_STD * copied_SD.T
