# SPDX-License-Identifier: Apache-2.0
"""The sparse formats that compressed-tensors removed, read by the commands."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from peft_spp import CompressedLinear
from peft_spp.cli import app
from peft_spp.compressed.checkpoint_run import compress_checkpoint, decompress_checkpoint
from peft_spp.sparsity import compare_sparsity, sparsity_report

from helpers.compressed_cases import same_tensors, tensors_of
from helpers.old_formats import FORMATS, OTHER_FORMATS, damage_, save_old, sparse_bitmask, write_old
from helpers.tiny import tiny, tiny_llama


NAME = "model.layers.1.mlp.down_proj"


def run(*arguments):
    return CliRunner().invoke(app, [str(one) for one in arguments])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("suffix", ["", ".weight"])
@pytest.mark.parametrize("key", ["quantization_config", "compression_config", "sparsity_config"])
def test_both_commands_read_them(tmp_path, name, dtype, suffix, key):
    expected = write_old(tmp_path / "old", name, dtype, key, suffix)
    result = run("decompress", tmp_path / "old", tmp_path / "dense", "--json")
    assert result.exit_code == 0, result.stderr
    assert len(json.loads(result.stdout)["modules"]) == 21
    assert same_tensors(tensors_of(tmp_path / "dense"), expected)
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert not {"quantization_config", "compression_config", "sparsity_config"} & config.keys()
    assert run("compress", tmp_path / "old", tmp_path / "small").exit_code == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype="auto")
    assert same_tensors(loaded.dequantize().state_dict(), expected)
    decompress_checkpoint(tmp_path / "small", tmp_path / "again")
    assert same_tensors(tensors_of(tmp_path / "again"), expected)


@pytest.mark.parametrize("name", FORMATS)
def test_reports_read_them_and_other_tools_say_what_to_do(tmp_path, name):
    write_old(tmp_path / "old", name)
    decompress_checkpoint(tmp_path / "old", tmp_path / "dense")
    reports = [sparsity_report(tmp_path / one) for one in ("old", "dense")]
    assert [vars(one) for one in reports[0]] == [vars(one) for one in reports[1]]
    assert compare_sparsity(tmp_path / "old", tmp_path / "dense").kept
    result = run("prune", tmp_path / "old", tmp_path / "pruned", "--method", "magnitude", "--sparsity", "0.7")
    assert result.exit_code == 2
    assert "decompress" in result.stderr


def test_offsets_in_the_file_are_not_read(tmp_path):
    expected = write_old(tmp_path / "old", "sparse-bitmask")
    file = tmp_path / "old" / "model.safetensors"
    tensors = load_file(file)
    for one in tensors:
        if one.endswith("row_offsets"):
            tensors[one] = torch.full_like(tensors[one], 1 << 50)
    save_file(tensors, file)
    decompress_checkpoint(tmp_path / "old", tmp_path / "dense")
    assert same_tensors(tensors_of(tmp_path / "dense"), expected)


SIZES = {"vocab_size": 64, "hidden_size": 36, "num_hidden_layers": 2}
WHOLE = {
    "llama": lambda: tiny_llama(attention_bias=True),
    # norms without weights
    "olmo": lambda: tiny(
        "OlmoForCausalLM", **SIZES, intermediate_size=52, num_attention_heads=2, attention_bias=True, eos_token_id=1
    ),
    # parameters of other names than weight and bias, and three dimensions
    "mamba": lambda: tiny("MambaForCausalLM", **SIZES, state_size=4),
}


def write_whole(folder, kind, dtype=torch.float32):
    """Write a model as compressed-tensors 0.8.1 did, with every tensor compressed, and return its tensors."""
    model = WHOLE[kind]().to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and "k_proj" not in name:  # whose biases are zero, so without any value
            torch.nn.init.normal_(parameter)
        with torch.no_grad():
            parameter[torch.rand(parameter.shape) < 0.5] = 0.0
    expected = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    parts = {name: sparse_bitmask(tensor) for name, tensor in expected.items()}
    save_old(folder, model, {f"{name}.{part}": one for name, found in parts.items() for part, one in found.items()})
    return expected


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_in_which_every_tensor_is_compressed(tmp_path, kind, dtype):
    old, dense = tmp_path / "old", tmp_path / "dense"
    expected = write_whole(old, kind, dtype)
    report = decompress_checkpoint(old, dense)
    assert {one.tensor for one in report} == expected.keys()
    assert f"{len(expected)} tensors decompressed" in str(report)
    assert same_tensors(tensors_of(dense), expected)
    assert [vars(one) for one in sparsity_report(old)] == [vars(one) for one in sparsity_report(dense)]
    assert compare_sparsity(old, dense).kept
    assert run("inspect", old).exit_code == 0
    layers = compress_checkpoint(old, tmp_path / "small").modules.keys()
    assert layers == compress_checkpoint(dense, tmp_path / "same").modules.keys()
    assert same_tensors(tensors_of(tmp_path / "small"), tensors_of(tmp_path / "same"))
    model = AutoModelForCausalLM.from_pretrained(old, dtype="auto")
    assert {name for name, one in model.named_modules() if isinstance(one, CompressedLinear)} == layers
    model.save_pretrained(tmp_path / "new")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype="auto")
    for one in (model, again):
        assert same_tensors(one.dequantize().state_dict(), expected)


def test_a_bias_keeps_its_name_next_to_weights_that_are_named_after_modules(tmp_path):
    expected = write_whole(tmp_path / "old", "llama")
    file = tmp_path / "old" / "model.safetensors"
    save_file({name.replace(".weight.", "."): one for name, one in load_file(file).items()}, file, {"format": "pt"})
    decompress_checkpoint(tmp_path / "old", tmp_path / "dense")
    assert same_tensors(tensors_of(tmp_path / "dense"), expected)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "old")
    assert same_tensors(model.dequantize().state_dict(), expected)


@pytest.mark.parametrize("damage", ["values", "beyond", "narrow", "deeper"])
@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.bias", "model.norm.weight"])
def test_a_damaged_vector_is_refused_by_its_name(tmp_path, name, damage):
    write_whole(tmp_path / "old", "llama")
    file = tmp_path / "old" / "model.safetensors"
    tensors = load_file(file)
    bitmask = tensors[f"{name}.bitmask"]
    if damage == "values":
        tensors[f"{name}.compressed"] = tensors[f"{name}.compressed"][1:].clone()
    elif damage == "beyond":
        tensors[f"{name}.bitmask"] = torch.cat([bitmask, bitmask[:1]])
    elif damage == "narrow":
        tensors[f"{name}.bitmask"] = bitmask[1:].clone()
    else:
        tensors[f"{name}.bitmask"] = bitmask[None].clone()
    save_file(tensors, file, {"format": "pt"})
    result = run("decompress", tmp_path / "old", tmp_path / "out")
    assert result.exit_code == 2
    assert name in result.stderr, result.stderr
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        AutoModelForCausalLM.from_pretrained(tmp_path / "old")


@OTHER_FORMATS
def test_other_formats_are_refused_by_name(tmp_path, format_name, more, message):
    write_old(tmp_path / "old", format_name, **more)
    for command in ("decompress", "compress", "inspect"):
        out = () if command == "inspect" else (tmp_path / "out",)
        result = run(command, tmp_path / "old", *out)
        assert result.exit_code == 2
        assert message in result.stderr
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "damage",
    "values bitmask narrow shape flat negative huge missing beyond words integers short twice".split(),
)
@pytest.mark.parametrize("name", FORMATS)
def test_damaged_ones_are_refused_by_the_name_of_the_tensor(tmp_path, name, damage):
    write_old(tmp_path / "old", name)
    file = tmp_path / "old" / "model.safetensors"
    tensors = load_file(file)
    values, bitmask, shape = (f"{NAME}.{part}" for part in ("compressed", "bitmask", "shape"))
    if damage == "shape":
        tensors[shape] = torch.tensor([36, 52, 1])
    elif damage == "flat":
        tensors[shape] = torch.tensor([36 * 52])
    elif damage == "negative":
        tensors[shape] = torch.tensor([-36, -52])
    elif damage == "huge":
        tensors[shape] = torch.tensor([1 << 62, 4])
    elif damage == "words":
        tensors[bitmask] = tensors[bitmask].int()
    elif damage == "integers":
        tensors[values] = tensors[values].int()
    elif damage == "short":
        tensors[shape] = torch.tensor([36, 0, 52, 0], dtype=torch.int32)  # the bytes of two numbers of 64 bits
    elif damage == "twice":
        tensors[f"{NAME}.weight"] = torch.ones(36, 52)
    else:
        damage_(tensors, NAME, damage)
    save_file(tensors, file)
    result = run("decompress", tmp_path / "old", tmp_path / "out")
    assert result.exit_code == 2
    assert NAME in result.stderr, result.stderr
    assert not (tmp_path / "out").exists()


def test_a_report_of_an_old_model_counts_its_bytes(tmp_path):
    write_old(tmp_path / "old", "sparse-bitmask", torch.bfloat16)
    report = compress_checkpoint(tmp_path / "old", tmp_path / "small")
    assert report.kept == {"lm_head": "left out"}
    stored = load_file(tmp_path / "old" / "model.safetensors")
    assert report.bytes_before == sum(one.numel() * one.element_size() for one in stored.values())
