# SPDX-License-Identifier: Apache-2.0
"""Tensors of all dtypes of safetensors: read if PyTorch can hold them, and carried through by what changes a model."""

import json
import math
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from peft_spp import SPPConfig
from peft_spp.checkpoints.safetensors_files import DTYPES, OTHER_DTYPES
from peft_spp.checkpoints.stored import count_non_finite
from peft_spp.checkpoints.tensor_file import open_tensor_file
from peft_spp.compressed import compress_checkpoint, decompress_checkpoint
from peft_spp.merge import merge_checkpoint
from peft_spp.pruning import prune_checkpoint

from helpers.merge_cases import save_adapter
from helpers.tiny import tiny_llama


READABLE = {**DTYPES, **OTHER_DTYPES}
# without a dtype of PyTorch whose elements they are: bits of an element
COPIED = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}


def write(file: Path, **tensors: tuple[str, tuple[int, ...], bytes]) -> None:
    """Write a safetensors file by hand."""
    header, stop = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [stop, stop + len(data)]}
        stop += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(data for _, _, data in tensors.values())
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def of_all_dtypes() -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    bits = {**{name: 8 * dtype.itemsize for name, dtype in READABLE.items()}, **COPIED}
    found = {}
    for name, size in bits.items():
        # zeros and ones are valid in every format
        data = [index % 2 for index in range(size)]  # of 8 elements
        found[f"extra.{name.lower()}"] = (name, (2, 4), bytes(data))
    found["extra.scalar"] = ("I64", (), bytes(8))
    found["extra.empty"] = ("I32", (0, 3), b"")
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Llama with a tensor of each dtype in a second file, which no layer has."""
    tiny_llama().save_pretrained(tmp_path / "base")
    names = load_file(tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "base" / "model-1.safetensors")
    write(tmp_path / "base" / "model-2.safetensors", **of_all_dtypes())
    weight_map = {
        **dict.fromkeys(names, "model-1.safetensors"),
        **dict.fromkeys(of_all_dtypes(), "model-2.safetensors"),
    }
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def assert_carried(folder: Path) -> None:
    found = {}
    for file in folder.glob("*.safetensors"):
        data = file.read_bytes()
        for one in open_tensor_file(file).tensors.values():
            name = one.dtype if isinstance(one.dtype, str) else next(n for n, d in READABLE.items() if d == one.dtype)
            found[one.name] = (name, one.shape, data[one.start : one.stop])
    assert {name: one for name, one in found.items() if name.startswith("extra")} == of_all_dtypes()


def test_what_is_not_pruned_is_carried_through(folder: Path) -> None:
    prune_checkpoint(folder / "base", folder / "pruned", method="magnitude", pattern="2:4")
    model = LlamaForCausalLM.from_pretrained(folder / "pruned")
    save_adapter(folder / "adapter", model, SPPConfig(r=4))
    ids = [torch.randint(60, (2, 16), generator=torch.Generator().manual_seed(1))]
    prune_checkpoint(folder / "base", folder / "wanda", method="wanda", pattern="2:4", calibration=ids)
    merge_checkpoint(folder / "pruned", folder / "adapter", folder / "merged", check_base="error")
    compress_checkpoint(folder / "pruned", folder / "small")
    decompress_checkpoint(folder / "small", folder / "again")
    for name in ("pruned", "wanda", "merged", "small", "again"):
        assert_carried(folder / name)


def test_an_integer_norm_is_computed_with_like_the_same_norm_in_float32(tmp_path: Path) -> None:
    model, name = tiny_llama(), "model.layers.1.input_layernorm.weight"
    model.get_parameter(name).data = torch.arange(32.0) % 5
    ids = [torch.randint(60, (2, 16), generator=torch.Generator().manual_seed(1))]
    pruned = []
    for dtype in (torch.float32, torch.int8):
        base, out = tmp_path / f"{dtype}", tmp_path / f"{dtype} pruned"
        model.save_pretrained(base)
        tensors = load_file(base / "model.safetensors")
        save_file(tensors | {name: tensors[name].to(dtype)}, base / "model.safetensors", metadata={"format": "pt"})
        prune_checkpoint(base, out, method="wanda", pattern="2:4", calibration=ids)
        pruned.append(load_file(out / "model.safetensors"))
    assert pruned[1].pop(name).dtype == torch.int8
    assert all(torch.equal(one, pruned[0][key]) for key, one in pruned[1].items())


@pytest.mark.parametrize("name", READABLE)
def test_every_dtype_is_read(tmp_path: Path, name: str) -> None:
    expected = torch.arange(6, dtype=torch.float32).to(READABLE[name]).view(2, 3)
    save_file({"one": expected}, tmp_path / "one.safetensors")
    stored = open_tensor_file(tmp_path / "one.safetensors").tensors["one"]
    found = stored.load()
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    assert count_non_finite(found) == 0
    if name in DTYPES or name in ("C64", "F8_E8M0"):
        broken = torch.full((3,), math.nan).to(READABLE[name])
        assert count_non_finite(broken) == 3


@pytest.mark.parametrize("name", COPIED)
def test_what_pytorch_cannot_hold_is_named(tmp_path: Path, name: str) -> None:
    write(tmp_path / "one.safetensors", one=(name, (2, 4), bytes(COPIED[name])))
    with pytest.raises(ValueError, match=f"tensor 'one' of .*one.safetensors has dtype {name}"):
        open_tensor_file(tmp_path / "one.safetensors").tensors["one"].load()
