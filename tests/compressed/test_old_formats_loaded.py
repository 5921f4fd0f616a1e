# SPDX-License-Identifier: Apache-2.0
"""The sparse formats that compressed-tensors removed, loaded by Transformers."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TorchAoConfig
from typer.testing import CliRunner

from peft_spp import BitmaskConfig, CompressedLinear
from peft_spp.cli import app
from peft_spp.compressed.checkpoint_run import decompress_checkpoint

from helpers.compressed_cases import same_tensors, tensors_of
from helpers.old_formats import FORMATS, OTHER_FORMATS, damage_, sparse_bitmask, write_old
from helpers.tiny_moe import tiny_moe


NAME = "model.layers.1.mlp.down_proj"


def run(*arguments):
    return CliRunner().invoke(app, [str(one) for one in arguments])


SETTINGS = pytest.mark.parametrize("settings", [{}, {"quantization_config": BitmaskConfig()}], ids=["plain", "asked"])


@SETTINGS
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("suffix", ["", ".weight"])
@pytest.mark.parametrize("key", ["quantization_config", "compression_config", "sparsity_config"])
def test_transformers_loads_them_compressed_and_saves_them_in_our_format(tmp_path, name, dtype, suffix, key, settings):
    expected = write_old(tmp_path / "old", name, dtype, key, suffix)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "old", dtype="auto", **settings)
    assert sum(isinstance(one, CompressedLinear) for one in model.modules()) == 21
    model.save_pretrained(tmp_path / "new")
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "bitmask"
    assert not {"compression_config", "sparsity_config"} & config.keys()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype="auto")
    for one in (model, again):
        assert same_tensors(one.dequantize().state_dict(), expected)
    decompress_checkpoint(tmp_path / "new", tmp_path / "dense")
    assert same_tensors(tensors_of(tmp_path / "dense"), expected)


def test_transformers_loads_them_in_another_dtype_and_from_shards(tmp_path):
    expected = write_old(tmp_path / "old", "sparse-bitmask")
    tensors = tensors_of(tmp_path / "old")
    (tmp_path / "old" / "model.safetensors").unlink()
    files = {}
    for number, one in enumerate(sorted(tensors)):  # so that the tensors of a weight lie apart
        files.setdefault(f"model-{number % 3}.safetensors", {})[one] = tensors[one]
    for file, inside in files.items():
        save_file(inside, tmp_path / "old" / file, {"format": "pt"})
    weight_map = {one: file for file, inside in files.items() for one in inside}
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "old" / "model.safetensors.index.json").write_text(json.dumps(index))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "old", dtype=dtype)
        assert sum(isinstance(one, CompressedLinear) for one in model.modules()) == 21
        assert same_tensors(model.dequantize().state_dict(), {k: one.to(dtype) for k, one in expected.items()})


def test_what_stays_dense_is_chosen_as_for_a_plain_model(tmp_path):
    expected = write_old(tmp_path / "old", "sparse-bitmask")
    file = tmp_path / "old" / "model.safetensors"
    tensors = load_file(file)
    for one in ("lm_head", "model.embed_tokens"):
        tensors |= {f"{one}.{part}": tensor for part, tensor in sparse_bitmask(tensors.pop(f"{one}.weight")).items()}
    save_file(tensors, file, {"format": "pt"})
    config = BitmaskConfig(modules_to_not_convert=["lm_head", "o_proj"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "old", quantization_config=config)
    assert sum(isinstance(one, CompressedLinear) for one in model.modules()) == 18
    assert same_tensors(model.dequantize().state_dict(), expected)


@SETTINGS
@pytest.mark.parametrize("damage", ["values", "bitmask", "narrow", "flat", "signed", "integers", "missing", "beyond"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_one_is_not_loaded(tmp_path, name, damage, settings):
    write_old(tmp_path / "old", name)
    file = tmp_path / "old" / "model.safetensors"
    tensors = load_file(file)
    values, bitmask = (f"{NAME}.{part}" for part in ("compressed", "bitmask"))
    if damage == "flat":
        tensors[bitmask] = tensors[bitmask].flatten()
    elif damage == "signed":
        tensors[bitmask] = tensors[bitmask].view(torch.int8)
    elif damage == "integers":
        tensors[values] = tensors[values].view(torch.int32)
    else:
        damage_(tensors, NAME, damage)
    save_file(tensors, file, {"format": "pt"})
    for more in ({}, {"ignore_mismatched_sizes": True}, {"dtype": torch.bfloat16}):
        with pytest.raises(ValueError, match=NAME.replace(".", r"\.")):
            AutoModelForCausalLM.from_pretrained(tmp_path / "old", **settings, **more)


@OTHER_FORMATS
def test_transformers_does_not_load_other_formats_at_random(tmp_path, format_name, more, message):
    write_old(tmp_path / "old", format_name, **more)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path / "old")


def test_another_quantization_and_a_state_dict_are_refused_with_the_way_out(tmp_path):
    write_old(tmp_path / "old", "sparse-bitmask", key="sparsity_config")
    with pytest.raises(ValueError, match=r"'sparse-bitmask'.*not with TorchAoConfig.*`peft-spp decompress`"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "old", quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
        )
    config = LlamaConfig.from_pretrained(tmp_path / "old")
    with pytest.raises(ValueError, match=r"'sparse-bitmask'.*without state_dict"):
        LlamaForCausalLM.from_pretrained(None, config=config, state_dict=tensors_of(tmp_path / "old"))


def test_experts_that_transformers_fuses_are_refused_with_the_command_that_reads_them(tmp_path):
    model = tiny_moe("qwen3_moe", pattern="0.5")
    model.save_pretrained(tmp_path / "old")
    expected = tensors_of(tmp_path / "old")
    tensors = dict(expected)
    for one in expected:
        if ".experts." in one:
            name = one.removesuffix(".weight")
            tensors |= {f"{name}.{part}": tensor for part, tensor in sparse_bitmask(tensors.pop(one)).items()}
    save_file(tensors, tmp_path / "old" / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    (tmp_path / "old" / "config.json").write_text(
        json.dumps({**config, "sparsity_config": {"format": "sparse-bitmask"}})
    )
    with pytest.raises(
        ValueError, match=r"layers\.0\.mlp\.experts\.0\.\w+\.weight is compressed.*`peft-spp decompress`"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path / "old")
    decompress_checkpoint(tmp_path / "old", tmp_path / "dense")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert same_tensors(loaded.state_dict(), model.state_dict())
