"""Adapters: which tensors are trained, made by peft, saved as peft saves them."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError
from ..recipe.schema import LORA_KINDS, AdapterSpec, ModelSpec
from .base import Base, because, empty_model, load_tokenizer
from .tensors import NamedTensors
from .trainables import has_part


def attach_adapter(base: Base, spec: AdapterSpec, *, seed: int) -> Any:
    """A trainable model over a frozen base: a peft model, or the base itself with gradients on for `full`.

    The initial values come from `seed` alone.

    Raises:
        ModelError: peft cannot put this adapter on this model; the message names what it looked for.
    """
    if spec.kind == "full":
        return base.model.requires_grad_(True)
    _check_targets(base, spec)
    from peft import get_peft_model, prepare_model_for_kbit_training

    model = base.model
    if getattr(model, "is_quantized", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, _peft_config(spec, base))
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            raise ModelError(
                f"a {spec.kind} adapter does not fit model {base.name!r}" + because(error),
                hint=_targets_hint(base),
            ) from error


def freeze(model: Any, part: str) -> NamedTensors:
    """Take a part of an adapter out of training: every tensor whose dotted name has it (`lora_A`). Call it before the
    `Trainables` are made, which then leave it out.

    Returns:
        A copy of what was frozen, by parameter name.

    Raises:
        ModelError: the adapter has no such part, or has pairs of which it is not the half that starts at random.
    """
    refuse_embeddings(model, "frozen")
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    frozen = {name: parameter for name, parameter in trainable.items() if has_part(name, part)}
    if not frozen:
        raise ModelError(
            f"the strategy freezes {part}, which this adapter does not have",
            hint="use model.adapter.kind lora or rslora, or federation.strategy fedavg",
        )
    for parameter in frozen.values():
        parameter.requires_grad_(False)
    return NamedTensors.of(frozen)


def refuse_embeddings(model: Any, what: str) -> None:
    """Raises ModelError: the adapter has a pair on an embedding, and pairs are to be `what` by halves."""
    # peft starts an embedding's pair the other way round, A at zero: B alone could never learn anything there
    reverse = next((n for n, p in model.named_parameters() if p.requires_grad and "lora_embedding_" in n), None)
    if reverse is not None:
        raise ModelError(
            f"the adapter has a pair on an embedding ({reverse}), whose halves cannot be {what} apart",
            hint="leave the embedding out of model.adapter.targets, or use federation.strategy fedavg",
        )


def _check_targets(base: Base, spec: AdapterSpec) -> None:
    """Every named target is in the model: peft passes over a name as long as another one fits."""
    names = [name for name, _ in base.model.named_modules()]
    for target in spec.targets if isinstance(spec.targets, list) else []:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            near = difflib.get_close_matches(target, linear_modules(base.model), n=1)
            raise ModelError(
                f"model {base.name!r} has no module called {target!r}, which model.adapter.targets names",
                hint=(f"did you mean {near[0]!r}? " if near else "") + _targets_hint(base),
            )


def _targets_hint(base: Base) -> str:
    known = ", ".join(linear_modules(base.model))
    return f"model.adapter.targets may be all-linear, auto, or some of: {known}"


def _peft_config(spec: AdapterSpec, base: Base) -> Any:
    import peft

    task = {"task_type": "CAUSAL_LM", "base_model_name_or_path": base.name}
    targets = None if spec.targets == "auto" else spec.targets
    if spec.kind in LORA_KINDS:
        return peft.LoraConfig(
            r=spec.r,
            lora_alpha=spec.alpha,
            lora_dropout=spec.dropout,
            target_modules=targets,
            use_dora=spec.kind == "dora",
            use_rslora=spec.kind == "rslora",
            **task,
        )
    if spec.kind == "ia3":
        # (IA)³ rescales keys, values and the feed-forward's inside (Liu 2022); peft knows these for each architecture
        return peft.IA3Config(
            target_modules=None if targets == "all-linear" else targets, **_ia3_feedforward(spec), **task
        )
    virtual = {"num_virtual_tokens": spec.virtual_tokens, **task}
    if spec.kind == "prompt":
        return peft.PromptTuningConfig(**virtual)
    if spec.kind == "prefix":
        return peft.PrefixTuningConfig(**virtual)
    return peft.PromptEncoderConfig(encoder_hidden_size=base.model.config.hidden_size, **virtual)


def _ia3_feedforward(spec: AdapterSpec) -> dict[str, list[str]]:
    return {"feedforward_modules": []} if isinstance(spec.targets, list) else {}


def linear_modules(model: torch.nn.Module) -> list[str]:
    """Last parts of the names of a model's linear layers, sorted: what `targets` may name."""
    kinds = (torch.nn.Linear,)
    found = {
        n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, kinds) or "Conv1D" in type(m).__name__
    }
    return sorted(found)


def is_adapter(model: Any) -> bool:
    """Whether a model carries a peft adapter (as against `full`)."""
    from peft import PeftModel

    return isinstance(model, PeftModel)


@contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """The base model as it was: inside, the adapter has no effect."""
    if not is_adapter(model):
        yield
        return
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with model.disable_adapter():
            yield
    finally:
        # peft leaves the whole adapter trainable behind it, frozen parts too
        for parameter, was in trained.items():
            parameter.requires_grad_(was)


def save_adapter(model: Any, tokenizer: Any | None, folder: Path) -> None:
    """Write the trained part as `PeftModel.from_pretrained` reads it (`full`: as `AutoModelForCausalLM` reads it)."""
    model.save_pretrained(str(folder), safe_serialization=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))


def save_full(spec: ModelSpec, weights: NamedTensors, folder: Path) -> None:
    """Write what a model folder is after all of its weights were trained, as `save_adapter` would with the model open
    and its tokenizer. The base's weights are not read, and none are held: they may be views of a file.

    Args:
        weights: all parameters by name.

    Raises:
        ModelError: the base model's configuration or tokenizer is not here, or has other parameters than these.
    """
    tokenizer, model = load_tokenizer(spec), empty_model(spec)
    names = {name: parameter.shape for name, parameter in model.named_parameters()}
    if names != {name: tensor.shape for name, tensor in weights.items()}:
        raise ModelError(
            f"the weights are not those of model {spec.name!r}", hint="was the run made with another base model?"
        )
    for name, tensor in weights.items():
        module, _, last = name.rpartition(".")
        setattr(model.get_submodule(module), last, torch.nn.Parameter(tensor, requires_grad=False))
    model.tie_weights()
    unknown = next((name for name, tensor in model.state_dict().items() if tensor.is_meta), None)
    if unknown is not None:
        raise ModelError(
            f"model {spec.name!r} has {unknown}, which is not trained and cannot be written without its files",
            hint="fetch with --tensors",
        )
    model.config.dtype = max(weights.layout.numels, key=lambda dtype: weights.layout.numels[dtype])
    save_adapter(model, tokenizer, folder)
