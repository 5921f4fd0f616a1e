# SPDX-License-Identifier: Apache-2.0
"""Files whose bitmask and values do not fit: an error that names the tensor, and no model."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

import peft_spp

from helpers.compressed_cases import IDS, pruned_llama, tensors_of


NAME = "model.layers.1.mlp.down_proj"
WEIGHT, BITMASK = f"{NAME}.weight", f"{NAME}.bitmask"


@pytest.fixture
def saved(tmp_path):
    peft_spp.compress(pruned_llama()).save_pretrained(tmp_path)
    return tmp_path, tensors_of(tmp_path)


def rewrite(folder, tensors):
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def more_values(tensors):
    tensors[WEIGHT] = torch.cat([tensors[WEIGHT], torch.ones(1)])


def fewer_values(tensors):
    tensors[WEIGHT] = tensors[WEIGHT][:-1].clone()


def no_value_at_all(tensors):
    tensors[WEIGHT] = torch.empty(0)


def one_more_bit(tensors):
    first = tensors[BITMASK][:, 0]
    row = (first != 255).nonzero()[0]
    first[row] |= first[row] + 1  # sets the lowest bit that is not set


def bit_beyond_the_last_column(tensors):
    # with as many bits as there are values
    row = (tensors[BITMASK][:, 0] != 0).nonzero()[0]
    byte = tensors[BITMASK][row, 0]
    tensors[BITMASK][row, 0] = byte & (byte - 1)
    tensors[BITMASK][row, 6] = 1


def fewer_rows(tensors):
    tensors[BITMASK] = tensors[BITMASK][:-1].clone()


def fewer_columns(tensors):
    tensors[BITMASK] = tensors[BITMASK][:, :-1].clone()


def flat_bitmask(tensors):
    tensors[BITMASK] = tensors[BITMASK].flatten()


def bitmask_of_one_number(tensors):
    tensors[BITMASK] = torch.tensor(1, dtype=torch.uint8)


def signed_bitmask(tensors):
    tensors[BITMASK] = tensors[BITMASK].view(torch.int8)


def floating_bitmask(tensors):
    tensors[BITMASK] = tensors[BITMASK].float()


def integer_values(tensors):
    tensors[WEIGHT] = tensors[WEIGHT].view(torch.int32)


def values_as_a_matrix(tensors):
    tensors[WEIGHT] = tensors[WEIGHT][None].clone()


def dense_weight_and_a_bitmask(tensors):
    tensors[WEIGHT] = torch.ones(32, 48)


def bitmask_of_an_embedding(tensors):
    tensors["model.embed_tokens.bitmask"] = torch.zeros(64, 8, dtype=torch.uint8)


DAMAGES = [
    more_values, fewer_values, no_value_at_all, one_more_bit, bit_beyond_the_last_column, fewer_rows, fewer_columns,
    flat_bitmask, bitmask_of_one_number, signed_bitmask, floating_bitmask, integer_values, values_as_a_matrix,
    dense_weight_and_a_bitmask, bitmask_of_an_embedding,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("settings", [{}, {"ignore_mismatched_sizes": True}, {"dtype": torch.float16}], ids=str)
def test_damage_is_found_and_the_tensor_named(saved, damage, settings):
    folder, tensors = saved
    damage(tensors)
    rewrite(folder, tensors)
    name = "model.embed_tokens.weight" if damage is bitmask_of_an_embedding else WEIGHT
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as error:
        AutoModelForCausalLM.from_pretrained(folder, **settings)
    if damage in (flat_bitmask, bitmask_of_one_number):
        assert "a weight of shape (32, 48)" in str(error.value)


def test_two_damaged_tensors_are_counted(saved):
    folder, tensors = saved
    more_values(tensors)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.empty(0)
    rewrite(folder, tensors)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj\.weight: .* \(1 more"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_model_of_other_sizes_is_not_loaded(saved):
    folder, _ = saved
    config = AutoConfig.from_pretrained(folder)
    config.intermediate_size *= 2
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):  # more outputs, as of a dense model
        AutoModelForCausalLM.from_pretrained(folder, config=config)
    with pytest.raises(ValueError, match=r"or the model has other sizes: .* load it with its own configuration"):
        AutoModelForCausalLM.from_pretrained(folder, config=config, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("missing", [WEIGHT, BITMASK])
def test_half_of_a_weight_is_refused(saved, missing):
    folder, tensors = saved
    del tensors[missing]
    rewrite(folder, tensors)
    for settings in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(ValueError, match=rf"{WEIGHT}: the checkpoint has its"):
            AutoModelForCausalLM.from_pretrained(folder, **settings)


@pytest.mark.parametrize("share", [0.2, 0.9, 0.999])
def test_a_truncated_file_is_refused(saved, share):
    folder, _ = saved
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(Exception, match=r"(?i)incomplete|invalid|header|bounds"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_offsets_in_a_file_are_not_read(saved):
    folder, tensors = saved
    expected = AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
    for name in [name for name in tensors if name.endswith("bitmask")]:
        tensors[name.replace("bitmask", "row_offsets")] = torch.full((49,), 1 << 40)
    rewrite(folder, tensors)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(IDS).logits, expected)


def test_a_shape_that_does_not_fit_the_file_is_refused(saved):
    folder, _ = saved
    content = (folder / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    header[BITMASK]["shape"][0] += 1
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    with pytest.raises(Exception, match=r"(?i)invalid|header|size"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("damage", [damage for damage in DAMAGES if damage is not bitmask_of_an_embedding])
def test_a_damaged_state_dict_does_not_change_a_model(damage):
    model = peft_spp.compress(pruned_llama())
    before = {name: one.clone() for name, one in model.state_dict().items()}
    tensors = {name: one.clone() for name, one in before.items()}
    damage(tensors)
    layer = model.get_submodule(NAME)
    inside = {name: tensors[f"{NAME}.{name}"] for name in ("weight", "bitmask")}
    with pytest.raises(ValueError, match="weight"):
        layer.load_state_dict(inside)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
