# SPDX-License-Identifier: Apache-2.0
"""Files of experts whose zeros are not stored, and that are damaged."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import peft_spp
from peft_spp.cli import app

from helpers.mixtures import pruned_mixture


pytestmark = pytest.mark.filterwarnings("ignore:.*stay dense")


PARTS = {
    "mixtral": ("model.layers.1.block_sparse_moe.experts.2.w3.weight", "model.layers.1.mlp.experts.gate_up_proj"),
    "qwen2_moe": ("model.layers.1.mlp.experts.0.down_proj.weight", "model.layers.1.mlp.experts.down_proj"),
    "gpt_oss": ("model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.gate_up_proj"),
}


def bitmask_of(name):
    return name.replace(".weight", ".bitmask") if name.endswith(".weight") else f"{name}_bitmask"


def more_values(tensors, name):
    tensors[name] = torch.cat([tensors[name], torch.ones(1)])


def no_value_at_all(tensors, name):
    tensors[name] = torch.empty(0)


def fewer_rows(tensors, name):
    tensors[bitmask_of(name)] = tensors[bitmask_of(name)][:-1].clone()


def fewer_columns(tensors, name):
    tensors[bitmask_of(name)] = tensors[bitmask_of(name)][..., :-1].clone()


def flat_bitmask(tensors, name):
    tensors[bitmask_of(name)] = tensors[bitmask_of(name)].flatten()


def floating_bitmask(tensors, name):
    tensors[bitmask_of(name)] = tensors[bitmask_of(name)].float()


def bit_beyond_the_last_column(tensors, name):
    tensors[bitmask_of(name)][..., -1] |= 128


def integer_values(tensors, name):
    tensors[name] = tensors[name].view(torch.int32)


def values_as_a_matrix(tensors, name):
    tensors[name] = tensors[name][None].clone()


def no_bitmask(tensors, name):
    del tensors[bitmask_of(name)]


def no_values(tensors, name):
    del tensors[name]


DAMAGES = [
    more_values, no_value_at_all, fewer_rows, fewer_columns, flat_bitmask, floating_bitmask,
    bit_beyond_the_last_column, integer_values, values_as_a_matrix, no_bitmask, no_values,
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    for kind in PARTS:
        peft_spp.compress(pruned_mixture(kind)).save_pretrained(folder / kind)
    return folder


@pytest.mark.parametrize("kind", list(PARTS))
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_the_tensor_named(kind, damage, folders, tmp_path):
    shutil.copytree(folders / kind, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    header = json.loads(file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")])
    tensors = load_file(file)
    name, stack = PARTS[kind]
    damage(tensors, name)
    save_file(tensors, file, header["__metadata__"])
    # of experts that are incomplete the stack is named
    named = stack if damage in (no_bitmask, no_values) else name
    for settings in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(ValueError, match=f"{named.replace('.', chr(92) + '.')}.*The checkpoint is damaged"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto", **settings)
    result = CliRunner().invoke(app, ["decompress", str(tmp_path / "model"), str(tmp_path / "out")])
    assert (result.exit_code != 0 and name in result.output.replace("\n", "")) or bitmask_of(name) in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", [one for one in DAMAGES if one not in (no_bitmask, no_values)])
def test_a_damaged_state_dict_does_not_change_a_model(damage):
    model = peft_spp.compress(pruned_mixture("gpt_oss"))
    before = {name: one.clone() for name, one in model.state_dict().items()}
    tensors = {name: one.clone() for name, one in before.items()}
    name, _ = PARTS["gpt_oss"]
    damage(tensors, name)
    experts = model.get_submodule(name.rpartition(".")[0])
    inside = {one.rpartition(".")[2]: tensor for one, tensor in tensors.items() if one.startswith(name)}
    with pytest.raises(ValueError, match="gate_up_proj"):
        experts.load_state_dict(inside, strict=False)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
