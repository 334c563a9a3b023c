"""What must be the same wherever a run's tasks are carried out, and the check that it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from ..errors import SiteError
from ..model.base import tokenizer_digest
from .bench import Bench

#: what decides an adapter's effect beside its tensors
_ADAPTER_FIELDS = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_dora",
    "use_rslora",
    "num_virtual_tokens",
    "encoder_hidden_size",
    "feedforward_modules",
    "target_modules",
)


def handshake(bench: Bench) -> dict[str, str]:
    """What a bench is made of, by name: SHA-256 digests in hex, or the value itself where people can read it."""
    return {
        "base weights": bench.base_digest,
        "tokenizer": tokenizer_digest(bench.base.tokenizer),
        "chat template": _template(bench.base.tokenizer),
        "adapter layout": bench.theta.layout.digest,
        "adapter": _adapter(bench.model),
        "dtype": _dtype(bench.base.model),
        "quantization": bench.recipe.model.quantization,
    }


def check_handshake(expected: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Compare what a job was made with (`expected`) to what is here.

    Raises:
        SiteError: names everything that differs, or that only one side knows, with both values.
    """
    names = [*expected, *(name for name in found if name not in expected)]
    differing = [name for name in names if expected.get(name) != found.get(name)]
    if differing:
        parts = [f"{n}: the job has {expected.get(n, 'nothing')}, here is {found.get(n, 'nothing')}" for n in differing]
        raise SiteError(
            f"this site does not have what the job was made with; {'; '.join(parts)}",
            hint="use the same model and tokenizer files, and give model.dtype in the recipe where devices differ; "
            "the versions of commonweight, transformers and peft may differ too",
        )


def _template(tokenizer: Any) -> str:
    template = getattr(tokenizer, "chat_template", None)
    return "none" if not template else hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()


def _adapter(model: Any) -> str:
    """The adapter as peft made it: `lora r=8 lora_alpha=16 … target_modules=k_proj,q_proj`; or `full`."""
    configs = getattr(model, "peft_config", None)
    if not configs:
        return "full"
    config = next(iter(configs.values()))
    values = {name: getattr(config, name, None) for name in _ADAPTER_FIELDS}
    return " ".join([config.peft_type.value.lower(), *(f"{n}={_text(v)}" for n, v in values.items() if v is not None)])


def _text(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:g}"
    return ",".join(sorted(value)) if isinstance(value, set | list | tuple) else str(value)


def _dtype(model: Any) -> str:
    frozen = {str(p.dtype) for p in model.parameters() if not p.requires_grad}
    dtypes = frozen or {str(p.dtype) for p in model.parameters()}
    return ", ".join(sorted(name.removeprefix("torch.") for name in dtypes))
