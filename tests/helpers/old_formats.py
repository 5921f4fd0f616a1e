# SPDX-License-Identifier: Apache-2.0
"""Sparse checkpoints as compressed-tensors wrote them until it removed these formats, made from what it published."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from .compressed_cases import pruned_llama
from .tiny import block_linears


def packed(mask):
    return torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder="little"))


def sparse_bitmask(weight):
    mask = weight != 0
    counts = mask.sum(-1)
    return {
        "shape": torch.tensor(weight.shape),
        "compressed": weight[mask],
        "bitmask": packed(mask),
        "row_offsets": torch.cumsum(counts, 0) - counts,
    }


def sparse_24_bitmask(weight):
    # exactly two of four, the largest, whether they are zero or not
    groups = weight.reshape(-1, 4)
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.abs().topk(2, dim=1).indices, True)
    mask = mask.reshape(weight.shape)
    return {
        "shape": torch.tensor(weight.shape).reshape(-1, 1),
        "compressed": weight[mask].reshape(len(weight), -1),
        "bitmask": packed(mask),
    }


FORMATS = {"sparse-bitmask": (sparse_bitmask, "0.6"), "sparse-24-bitmask": (sparse_24_bitmask, "2:4")}


def write_old(folder, name, dtype=torch.float32, key="quantization_config", suffix="", **more):
    """Write a model in an old format, and return what its tensors have to be."""
    make, pattern = FORMATS.get(name, FORMATS["sparse-bitmask"])
    model = pruned_llama(dtype, pattern, hidden_size=36, intermediate_size=52, num_attention_heads=2)
    expected = {one: tensor.detach().clone() for one, tensor in model.state_dict().items()}
    tensors = dict(expected)
    for one in block_linears(model):
        weight = expected[f"{one}.weight"]
        # a -0.0 is not stored in these formats, and of four values two
        weight[0, :4] = torch.tensor([0.0, 0.5, 0.0, 0.0])
        weight[weight == 0] = 0.0
        del tensors[f"{one}.weight"]
        tensors |= {f"{one}{suffix}.{part}": tensor for part, tensor in make(weight).items()}
    save_old(folder, model, tensors, name, key, **more)
    return expected


def save_old(folder, model, tensors, name="sparse-bitmask", key="quantization_config", **more):
    folder.mkdir()
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    sparsity = {"format": name, "sparsity_structure": "unstructured", "global_sparsity": 0.5}
    inside = {"quant_method": "compressed-tensors", "format": "dense", "sparsity_config": sparsity, **more}
    config[key] = sparsity if key == "sparsity_config" else inside
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {one: tensor.contiguous() for one, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )


OTHER_FORMATS = pytest.mark.parametrize(
    ("format_name", "more", "message"),
    [
        ("marlin-24", {}, "'marlin-24'"),
        ("sparse-bitmask", {"config_groups": {"group_0": {}}}, "quantized values"),
        ("sparse-24-bitmask", {"format": "float-quantized"}, "float-quantized"),
    ],
)


def damage_(tensors, name, damage):
    """Damage a weight in a way that the commands and Transformers are both tried with."""
    values, bitmask = f"{name}.compressed", f"{name}.bitmask"
    if damage == "values":
        tensors[values] = tensors[values][1:].clone()
    elif damage == "bitmask":
        tensors[bitmask][5, 2] = 255
    elif damage == "narrow":
        tensors[bitmask] = tensors[bitmask][:, 1:].clone()
    elif damage == "missing":
        del tensors[bitmask]
    else:
        assert damage == "beyond"
        tensors[bitmask][5, -1] |= 128
