"""LoRA adapters as files: pairs read from the folder that peft has written, and pairs of any ranks written as one.

No model is needed for it. Pairs are named as in the files: `base_model.model.….q_proj`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

Pairs = Mapping[str, tuple[Tensor, Tensor]]

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_ROOT = "base_model.model."


def scale_of(folder: Path) -> float:
    """An adapter's s, α/r or α/√r, if all of its pairs have one rank."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    return float(config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"]))


def read_pairs(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Each module's (B, A), as they were trained: the module's change of weight is `scale_of(folder)`·BA."""
    tensors = load_file(folder / WEIGHTS)
    modules = sorted({name.partition(".lora_")[0] for name in tensors})
    return {m: (tensors[f"{m}.lora_B.weight"], tensors[f"{m}.lora_A.weight"]) for m in modules}


def write_pairs(folder: Path, pairs: Pairs, *, like: Path) -> None:
    """Write pairs (B, A), of scale 1 and of any ranks, as a LoRA adapter that peft opens, in float32.

    Args:
        folder: made if need be; what else lies in it stays.
        like: an adapter's folder; base model, task and layout are as in its configuration.
    """
    ranks = {module.removeprefix(_ROOT): A.shape[0] for module, (_, A) in pairs.items()}
    config: dict[str, Any] = json.loads((like / CONFIG).read_text(encoding="utf-8"))
    largest = max(ranks.values())
    config |= {
        "r": largest,
        "lora_alpha": largest,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": sorted(ranks),
    }
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{module}.lora_{letter}.weight": factor.float().contiguous()
        for module, (B, A) in pairs.items()
        for letter, factor in (("B", B), ("A", A))
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
