"""The folder of a model whose every weight was trained, written without opening the model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from commonweight.errors import ModelError
from commonweight.lead.fetch import Files
from commonweight.model.adapters import attach_adapter, save_adapter, save_full
from commonweight.model.base import load_base, load_weights
from commonweight.model.tensors import NamedTensors
from commonweight.model.trainables import Trainables
from commonweight.recipe.schema import AdapterSpec, ModelSpec

from .tiny_models import MODELS


def model_folder(folder: Path, which: str, tokenizer: Path) -> Path:
    """A model in transformers layout, with another's tokenizer."""
    shutil.copytree(tokenizer, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json", "generation*"))
    kind, config, values = MODELS[which]
    torch.manual_seed(3)
    kind(config(**{**values, "vocab_size": 4096})).save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("which", ["llama", "untied", "conv1d", "head bias"])
def test_the_folder_is_that_of_the_opened_model(tmp_path: Path, small_model: Path, which: str, dtype: str) -> None:
    spec = ModelSpec.model_validate(
        {"name": str(model_folder(tmp_path / "base", which, small_model)), "dtype": dtype, "adapter": {"kind": "full"}}
    )
    base = load_base(spec, torch.device("cpu"))
    model = attach_adapter(base, AdapterSpec(kind="full"), seed=0)
    trainables = Trainables(model)
    for flat in trainables.values.flats.values():
        flat.mul_(1.5)
    save_adapter(model, base.tokenizer, tmp_path / "opened")
    with Files(tmp_path) as files:
        weights = files("theta", trainables.values.layout).copy_(trainables.values)
        save_full(spec, weights, tmp_path / "written")
    assert not list(tmp_path.glob("*.part"))
    names = {path.name for path in (tmp_path / "opened").iterdir()}
    assert names == {path.name for path in (tmp_path / "written").iterdir()}
    for name in names - {"model.safetensors"}:
        assert (tmp_path / "written" / name).read_text() == (tmp_path / "opened" / name).read_text(), name
    opened, written = (load_weights(spec, str(tmp_path / where), dtype="auto") for where in ("opened", "written"))
    assert {n: p.dtype for n, p in written.named_parameters()} == {n: p.dtype for n, p in opened.named_parameters()}
    assert all(torch.equal(p, dict(opened.named_parameters())[n]) for n, p in written.named_parameters())


def test_weights_of_another_model_are_refused(tmp_path: Path, small_model: Path) -> None:
    spec = ModelSpec.model_validate({"name": str(small_model), "adapter": {"kind": "full"}})
    with pytest.raises(ModelError, match="are not those of model"):
        save_full(spec, NamedTensors.of({"a": torch.zeros(2)}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tensors_in_files_are_zeros_of_their_own_or_wide(tmp_path: Path) -> None:
    like = NamedTensors.of({"a": torch.zeros(5, 3), "b": torch.zeros(7, dtype=torch.bfloat16), "c": torch.tensor(1)})
    with Files(tmp_path) as files:
        narrow, wide = files("theta", like.layout), files("control", like.layout, wide=True)
        assert wide.flats[torch.bfloat16].dtype == torch.float32
        for tensors in (narrow, wide):
            assert not any(flat.any() for flat in tensors.flats.values())
            for number, flat in enumerate(tensors.flats.values(), 1):
                flat.fill_(number)
        assert {dtype: set(flat.tolist()) for dtype, flat in narrow.flats.items()} == {
            torch.float32: {1},
            torch.bfloat16: {2},
            torch.int64: {3},
        }
        assert wide["b"].tolist() == [2.0] * 7
    assert not list(tmp_path.iterdir())
