# SPDX-License-Identifier: Apache-2.0
"""Tiny base models and adapters on disk, and what PEFT makes of them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_spp import SPPConfig

from helpers.tiny import prune_, randomize, tiny, tiny_llama


GPT2 = {"vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
BERT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
}


class Case(NamedTuple):
    base: Path
    adapter: Path
    model_class: type

    def peft_model(self) -> PeftModel:
        return PeftModel.from_pretrained(self.model_class.from_pretrained(self.base), self.adapter)


def save_case(
    folder: Path,
    model: nn.Module,
    config: SPPConfig | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "1GB",
    model_class: type | None = None,
) -> Case:
    """Save a pruned model, and an adapter of it with random factors and random trained tensors."""
    torch.manual_seed(1)
    model = model.to(dtype)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and "head" not in name:
            prune_(module.weight.t() if isinstance(module, Conv1D) else module.weight, "2:4")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_()
            elif parameter.dim() == 2:
                parameter[0, :2] = -0.0
    model.save_pretrained(folder / "base", max_shard_size=shard_size)
    model_class = model_class or type(model)
    save_adapter(folder / "adapter", model_class.from_pretrained(folder / "base"), config)
    return Case(folder / "base", folder / "adapter", model_class)


def save_adapter(folder: Path, model: nn.Module, config: SPPConfig | None = None) -> None:
    adapted = get_peft_model(model, config or SPPConfig(r=5, task_type="CAUSAL_LM"))
    randomize(adapted)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and ".spp_" not in name:
                parameter.normal_()
    adapted.save_pretrained(folder)


def llama_case(folder: Path, config: SPPConfig | None = None, *, settings: dict | None = None, **options) -> Case:
    return save_case(folder, tiny_llama(**(settings or {})), config, **options)


def gpt2_case(folder: Path, config: SPPConfig | None = None, **options) -> Case:
    return save_case(folder, tiny("GPT2LMHeadModel", **GPT2), config, **options)


def merged_by_peft(case: Case, folder: Path) -> Path:
    case.peft_model().merge_and_unload().save_pretrained(folder)
    return folder


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the weight files in a folder, by name."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same_bits(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert tensor.dtype == expected[name].dtype and tensor.shape == expected[name].shape, name
        assert torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8)), name


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(file: Path, **changes: torch.Tensor | None) -> None:
    """Set tensors of a file, or remove those that are `None`."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file) | changes
    save_file({k: v.contiguous() for k, v in tensors.items() if v is not None}, file, metadata=metadata)


def auto(name: str) -> type:
    return getattr(transformers, name)


def contents(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, hidden files included."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def names(folder: Path) -> set[str]:
    """The files of a model besides its card, which merging writes where there is none."""
    return contents(folder).keys() - {"README.md"}


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)
