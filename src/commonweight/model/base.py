"""Base models: a folder or hub id in transformers layout in, a frozen causal language model and its tokenizer out."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

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

    name = spec.tokenizer or spec.name
    source = _source(name)
    try:
        return AutoTokenizer.from_pretrained(source, revision=spec.revision, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for one cause: the tokenizer's files
        _refuse_code(name, error)
        raise ModelError(
            f"no tokenizer could be loaded for model {name!r}" + because(error),
            hint="the folder needs tokenizer.json (or the tokenizer's own files); or name another by model.tokenizer"
            if Path(source).is_dir()
            else _loading_hint(name),
        ) from error


def load_base(spec: ModelSpec, device: torch.device) -> Base:
    """Load a base model and freeze it.

    Raises:
        ModelError: it does not exist here, is no causal language model, its files are damaged, or its quantization
            cannot be had on this machine.
    """
    _check_config(spec)
    tokenizer = load_tokenizer(spec)
    arguments: dict[str, Any] = {"dtype": _dtype(spec, device)}
    if spec.quantization != "none":
        arguments |= {"quantization_config": _quantization(spec, device), "device_map": {"": device}}
    model = load_weights(spec, spec.name, **arguments)
    if spec.quantization == "none":
        model = model.to(device)
    _check_vocabulary(spec, model, tokenizer)
    model.requires_grad_(False)
    model.eval()
    _check_causal(spec, model)
    return Base(spec.name, model, tokenizer, sum(p.numel() for p in model.parameters()), device)


def bare_base(spec: ModelSpec, device: torch.device) -> Base:
    """A model without its weights, every parameter on the device `meta`, and without a tokenizer: for its shapes.

    Args:
        device: that it would be loaded for, which decides its dtype.

    Raises:
        ModelError: as `load_base`, as far as the configuration tells.
    """
    from transformers import AutoModelForCausalLM

    config = _check_config(spec)
    try:
        with torch.device("meta"), _quiet():
            model = AutoModelForCausalLM.from_config(config, dtype=_dtype(spec, device), trust_remote_code=False)
    except Exception as error:  # as in load_weights
        raise _not_loaded(spec.name, error) from error
    model.requires_grad_(False)
    return Base(spec.name, model, None, sum(p.numel() for p in model.parameters()), torch.device("meta"))


def _check_config(spec: ModelSpec) -> Any:
    """A model's configuration; refuses what is no causal language model by it, before anything large is read."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    source = Path(_source(spec.name))
    if spec.name.startswith((".", "/", "~")) and not source.is_dir():
        raise ModelError(f"there is no model folder {spec.name}", hint="correct model.name")
    if (source / "adapter_config.json").exists() and not (source / "config.json").exists():
        raise ModelError(
            f"the folder {spec.name} holds an adapter, not a model",
            hint="name its base model; `commonweight export --merge` makes a model of a run's adapter",
        )
    try:
        config = AutoConfig.from_pretrained(str(source), revision=spec.revision, trust_remote_code=False)
    except Exception as error:  # as in load_weights
        raise _not_loaded(spec.name, error) from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"the model {spec.name!r} is of type {config.model_type}, which is no causal language model",
            hint="use one that predicts the next token, such as Llama, Qwen, Mistral or GPT-2",
        )
    return config


def load_weights(spec: ModelSpec, name: str, **arguments: Any) -> Any:
    """The causal language model in a folder or on the hub, with every weight from its files.

    Raises:
        ModelError: it cannot be loaded, or its files lack a weight or hold one of another shape.
    """
    from transformers import AutoModelForCausalLM

    revision = spec.revision if name == spec.name else None
    try:
        with _quiet():
            model, found = AutoModelForCausalLM.from_pretrained(
                _source(name),
                revision=revision,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                output_loading_info=True,
                **arguments,
            )
    except Exception as error:  # missing files, damaged weights, too little memory: many kinds
        raise _not_loaded(name, error) from error
    # transformers fills what the files lack with fresh random numbers
    for what, weights in (("lack", found["missing_keys"]), ("hold another shape of", found["mismatched_keys"])):
        if weights:
            first = min(key if isinstance(key, str) else key[0] for key in weights)
            more = f" and {len(weights) - 1} more" if len(weights) > 1 else ""
            raise ModelError(
                f"the files of model {name!r} {what} the weights {first}{more}",
                hint="download or copy the model again, and check that config.json belongs to these weights",
            )
    return model


def empty_model(spec: ModelSpec) -> Any:
    """A model of the base's configuration without weights: its parameters have shapes and take no memory.

    Raises:
        ModelError: its configuration cannot be read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    _check_config(spec)
    source = _source(spec.name)
    with _quiet():
        config = AutoConfig.from_pretrained(source, revision=spec.revision, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        with suppress(OSError):  # it has none of its own
            model.generation_config = GenerationConfig.from_pretrained(source, revision=spec.revision)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, transformers neither draws progress bars nor logs below an error."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _check_causal(spec: ModelSpec, model: Any) -> None:
    """Refuse an encoder that transformers lets pass as a decoder (BERT, RoBERTa …): its tokens see those after them.

    In a causal model the first token's logits have no gradient at later tokens: not a small one, none.
    """
    seen: list[torch.Tensor] = []

    def tap(_: Any, __: Any, embedded: torch.Tensor) -> torch.Tensor:
        seen.append(embedded.detach().requires_grad_())
        return seen[0].clone()

    embedding = model.get_input_embeddings()
    ids = torch.arange(4, 8, device=model.device).remainder(embedding.weight.shape[0])[None]
    handle = embedding.register_forward_hook(tap)
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
    (gradient,) = torch.autograd.grad(logits[0, 0].float().sum(), seen[0])
    if bool((gradient[0, 1:].nan_to_num() != 0).any()):
        raise ModelError(
            f"the model {spec.name!r} is no causal language model: its tokens see those that come after them",
            hint="use one that predicts the next token, such as Llama, Qwen, Mistral or GPT-2",
        )


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of a model's parameters, in order of name."""
    sha = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        sha.update(f"{name} {parameter.dtype} {list(parameter.shape)}\n".encode())
        sha.update(bytes_of(parameter))
    return sha.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 over what decides which ids a text becomes: rules, vocabulary, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    template = json.dumps(getattr(tokenizer, "chat_template", None), sort_keys=True)
    return hashlib.sha256(f"{rules}\n{special}\n{template}".encode()).hexdigest()


def _source(name: str) -> str:
    return str(TINY_FOLDER) if name == TINY_MODEL else str(Path(name).expanduser()) if name.startswith("~") else name


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


def _not_loaded(name: str, error: Exception) -> ModelError:
    _refuse_code(name, error)
    if isinstance(error, SafetensorError):
        return ModelError(
            f"the weights of model {name!r} are damaged" + because(error), hint="download or copy the model again"
        )
    return ModelError(f"the model {name!r} could not be loaded" + because(error), hint=_loading_hint(name))


def _refuse_code(name: str, error: Exception) -> None:
    if "trust_remote_code" in str(error):
        raise ModelError(
            f"{name!r} comes with Python code of its own, which is never run",
            hint="use a model and a tokenizer of a kind that transformers itself has",
        ) from error


def _loading_hint(name: str) -> str:
    if Path(_source(name)).is_dir():
        return "the folder needs config.json and model.safetensors of a causal language model"
    return (
        "if it is a folder, check the path; if it is a hub id, check the name and that this machine can reach the hub"
    )


def because(error: BaseException) -> str:
    """`: reason`, the first sentence of another library's message, or nothing where it only heads a list."""
    reason = re.split(r"[.!] ", _first_line(error))[0]
    return "" if reason.endswith(":") else f": {reason}"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
