"""Base models: a folder or hub id in transformers layout in, a frozen causal language model and its tokenizer out."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError
from ..recipe.schema import TINY_MODEL, ModelSpec
from .tensors import bytes_of

TINY_FOLDER = Path(__file__).parent / "tiny"


@dataclass(frozen=True)
class Base:
    """A loaded base model.

    Args:
        model: a transformers causal language model on its device, in evaluation mode, gradients off.
        tokenizer: its tokenizer.
        num_parameters: weights of the base, tied ones counted once.
    """

    name: str
    model: Any
    tokenizer: Any
    num_parameters: int
    device: torch.device

    @property
    def context(self) -> int | None:
        """Longest sequence the model has positions for, or None if it does not say."""
        return getattr(self.model.config, "max_position_embeddings", None)


def choose_device(device: str) -> torch.device:
    """The device that a recipe's `engine.device` means here.

    Raises:
        ModelError: `cuda` was asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError("engine.device is cuda, but no CUDA GPU is visible", hint="use device: auto or cpu")
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def load_tokenizer(spec: ModelSpec) -> Any:
    """The tokenizer of a model (or the one that `model.tokenizer` names).

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    source = _source(spec.tokenizer or spec.name)
    try:
        return AutoTokenizer.from_pretrained(source, revision=spec.revision, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for one cause: the tokenizer's files
        raise ModelError(
            f"no tokenizer could be loaded for model {spec.tokenizer or spec.name!r}: {_first_line(error)}",
            hint="the folder needs tokenizer.json (or the tokenizer's own files); or name another by model.tokenizer",
        ) from error


def load_base(spec: ModelSpec, device: torch.device) -> Base:
    """Load a base model and freeze it.

    Raises:
        ModelError: it does not exist here, is no causal language model, its files are damaged, or its quantization
            cannot be had on this machine.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    tokenizer = load_tokenizer(spec)
    arguments: dict[str, Any] = {"dtype": _dtype(spec, device), "revision": spec.revision, "trust_remote_code": False}
    if spec.quantization != "none":
        arguments |= {"quantization_config": _quantization(spec, device), "device_map": {"": device}}
    try:
        model = AutoModelForCausalLM.from_pretrained(_source(spec.name), **arguments)
    except Exception as error:  # missing files, wrong architecture, damaged weights: one sentence for each
        raise ModelError(
            f"the model {spec.name!r} could not be loaded: {_first_line(error)}", hint=_loading_hint(spec.name)
        ) from error
    if spec.quantization == "none":
        model = model.to(device)
    _check_vocabulary(spec, model, tokenizer)
    model.requires_grad_(False)
    model.eval()
    return Base(spec.name, model, tokenizer, sum(p.numel() for p in model.parameters()), device)


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of a model's parameters, in order of name."""
    sha = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        sha.update(f"{name} {parameter.dtype} {list(parameter.shape)}\n".encode())
        sha.update(bytes_of(parameter))
    return sha.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 over everything that decides which ids a text becomes: rules, vocabulary, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    template = json.dumps(getattr(tokenizer, "chat_template", None), sort_keys=True)
    return hashlib.sha256(f"{rules}\n{template}".encode()).hexdigest()


def _source(name: str) -> str:
    return str(TINY_FOLDER) if name == TINY_MODEL else name


def _dtype(spec: ModelSpec, device: torch.device) -> torch.dtype:
    if spec.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[spec.dtype]


def _quantization(spec: ModelSpec, device: torch.device) -> Any:
    if device.type != "cuda":
        raise ModelError(
            f"model.quantization {spec.quantization} needs a CUDA GPU, and this run is on {device.type}",
            hint="use quantization: none here",
        )
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ModelError(
            f"model.quantization {spec.quantization} needs the package bitsandbytes",
            hint="pip install 'commonweight[gpu]'",
        ) from error
    from transformers import BitsAndBytesConfig

    if spec.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=_dtype(spec, device),
    )


def _check_vocabulary(spec: ModelSpec, model: Any, tokenizer: Any) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens, but model {spec.name!r} has embeddings for {rows}",
            hint="use the tokenizer that belongs to the model",
        )


def _loading_hint(name: str) -> str:
    if Path(name).is_dir():
        return "the folder needs config.json and model.safetensors of a causal language model"
    if name.startswith((".", "/", "~")):
        return "no such folder: correct model.name"
    return (
        "if it is a folder, check the path; if it is a hub id, check the name and that this machine can reach the hub"
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
