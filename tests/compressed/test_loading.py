# SPDX-License-Identifier: Apache-2.0
"""Transformers loads and saves compressed weights, from compressed checkpoints and from plain ones."""

import copy
import json
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from peft import AutoPeftModelForCausalLM, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

import peft_spp
from peft_spp import BitmaskConfig, CompressedLinear, SPPConfig

from helpers.compressed_cases import IDS, pruned_llama, same_tensors, tensors_of
from helpers.tiny import LLAMA, block_linears, prune_, tiny


pytestmark = pytest.mark.filterwarnings("error:.*stay dense")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def load(folder, **settings):
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": "auto", **settings})


def compressed_layers(model):
    return {name for name, layer in model.named_modules() if isinstance(layer, CompressedLinear)}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A pruned model in bfloat16, and its folder."""
    folder = tmp_path_factory.mktemp("dense")
    model = pruned_llama(torch.bfloat16)
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def compressed(dense, tmp_path_factory):
    """The folder of the same model, compressed."""
    folder = tmp_path_factory.mktemp("compressed")
    load(dense[1], quantization_config=BitmaskConfig()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_size", ["1GB", "6KB"])
def test_a_plain_checkpoint_is_compressed_saved_and_loaded_bit_for_bit(tmp_path, dtype, tied, shard_size):
    model = pruned_llama(dtype, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "dense", max_shard_size=shard_size)
    expected = model(IDS).logits
    first = load(tmp_path / "dense", quantization_config=BitmaskConfig())
    assert compressed_layers(first) == block_linears(model).keys()
    first.save_pretrained(tmp_path / "compressed", max_shard_size=shard_size)
    second = load(tmp_path / "compressed")
    assert compressed_layers(second) == block_linears(model).keys()
    for loaded in (first, second):
        assert loaded.dtype == dtype
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
        torch.testing.assert_close(loaded(IDS).logits, expected, rtol=0, atol=16 * torch.finfo(dtype).eps)
    second.save_pretrained(tmp_path / "again", max_shard_size=shard_size)
    assert same_tensors(tensors_of(tmp_path / "compressed"), tensors_of(tmp_path / "again"))
    assert same_tensors(first.dequantize().state_dict(), model.state_dict())
    assert same_tensors(second.dequantize().state_dict(), model.state_dict())
    second.save_pretrained(tmp_path / "dense again", max_shard_size=shard_size)
    assert same_tensors(tensors_of(tmp_path / "dense"), tensors_of(tmp_path / "dense again"))
    config = json.loads((tmp_path / "dense again" / "config.json").read_text())
    assert config == json.loads((tmp_path / "dense" / "config.json").read_text())


def test_the_files_hold_values_and_a_bitmask_for_each_layer(dense, compressed):
    model, _ = dense
    tensors = tensors_of(compressed)
    for name, layer in block_linears(model).items():
        stored = int((layer.weight.detach().view(torch.int16) != 0).sum())
        assert tensors[f"{name}.weight"].shape == (stored,)
        assert tensors[f"{name}.weight"].dtype == torch.bfloat16
        assert tensors[f"{name}.bitmask"].shape == (layer.out_features, 8)
        assert tensors[f"{name}.bitmask"].dtype == torch.uint8
    assert len(tensors) == len(model.state_dict()) + len(block_linears(model))
    config = json.loads((compressed / "config.json").read_text())["quantization_config"]
    assert config == {
        "quant_method": "bitmask",
        "version": 1,
        "modules_to_not_convert": ["lm_head"],
        "min_sparsity": None,
    }


@pytest.mark.parametrize("source", ["dense", "compressed"])
@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": torch.float16},
        {"dtype": torch.float32},
        {"device_map": "cpu"},
        {"device_map": "auto"},
        {"device_map": {"": "cpu"}},
        {"low_cpu_mem_usage": True},
        {"use_safetensors": True},
    ],
    ids=str,
)
def test_however_it_is_loaded_it_has_the_dense_models_tensors(dense, compressed, source, settings):
    plain = load(dense[1], **settings)
    if source == "dense":
        loaded = load(dense[1], quantization_config=BitmaskConfig(), **settings)
    else:
        loaded = load(compressed, **settings)
    assert compressed_layers(loaded) == block_linears(plain).keys()
    assert same_tensors(loaded.dequantize().state_dict(), plain.state_dict())


def test_a_state_dict_is_loaded_too(dense, compressed):
    model, _ = dense
    settings = {"dtype": torch.bfloat16}
    from_dense = LlamaForCausalLM.from_pretrained(
        None, config=model.config, state_dict=model.state_dict(), quantization_config=BitmaskConfig(), **settings
    )
    assert same_tensors(from_dense.dequantize().state_dict(), model.state_dict())
    config = LlamaConfig.from_pretrained(compressed)
    from_compressed = LlamaForCausalLM.from_pretrained(
        None, config=config, state_dict=tensors_of(compressed), **settings
    )
    assert same_tensors(from_compressed.dequantize().state_dict(), model.state_dict())


def test_a_users_configuration_is_not_changed_and_serves_again(dense):
    config = BitmaskConfig()
    for _ in range(2):
        assert len(compressed_layers(load(dense[1], quantization_config=config))) == 21
        assert config.modules_to_not_convert is None


def test_body_and_other_heads_load_from_the_same_checkpoint(dense, compressed):
    model, _ = dense
    body = AutoModel.from_pretrained(compressed, dtype="auto")
    assert same_tensors(body.dequantize().state_dict(), model.model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        classifier = AutoModelForSequenceClassification.from_pretrained(compressed, dtype="auto", pad_token_id=0)
    assert type(classifier.score) is torch.nn.Linear
    assert torch.isfinite(classifier(IDS).logits).all()
    assert same_tensors(classifier.dequantize().model.state_dict(), model.model.state_dict())


def test_a_compressed_head_for_other_labels_is_replaced_as_a_dense_one_is(tmp_path):
    model = tiny("LlamaForSequenceClassification", **{**LLAMA, "num_labels": 6, "pad_token_id": 0})
    prune_(model.score.weight, "0.5")
    for layer in block_linears(model).values():
        prune_(layer.weight, "0.5")
    peft_spp.compress(model, modules_to_not_convert=[]).save_pretrained(tmp_path)
    cls = AutoModelForSequenceClassification
    assert type(cls.from_pretrained(tmp_path).score) is CompressedLinear
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        cls.from_pretrained(tmp_path, num_labels=3)
    other = cls.from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    assert type(other.score) is torch.nn.Linear and other.score.weight.shape == (3, 32)
    assert torch.isfinite(other(IDS).logits).all()


def test_layers_without_zeros_stay_dense_and_are_named_once(tmp_path):
    model = pruned_llama()
    torch.nn.init.ones_(model.model.layers[1].mlp.up_proj.weight)
    model.save_pretrained(tmp_path / "dense")
    with pytest.warns(UserWarning, match=r"stay dense: model\.layers\.1\.mlp\.up_proj \(0\.0% zeros\)") as told:
        loaded = load(tmp_path / "dense", quantization_config=BitmaskConfig())
    assert sum("stay dense" in str(one.message) for one in told) == 1
    assert compressed_layers(loaded) == block_linears(model).keys() - {"model.layers.1.mlp.up_proj"}
    loaded.save_pretrained(tmp_path / "compressed")
    config = json.loads((tmp_path / "compressed" / "config.json").read_text())["quantization_config"]
    assert config["modules_to_not_convert"] == ["lm_head", "model.layers.1.mlp.up_proj"]
    again = load(tmp_path / "compressed")
    assert compressed_layers(again) == compressed_layers(loaded)
    assert same_tensors(again.dequantize().state_dict(), model.state_dict())


def test_what_to_leave_out_and_how_many_zeros_it_takes_can_be_chosen(dense):
    model, folder = dense
    everything = block_linears(model).keys()
    config = BitmaskConfig(modules_to_not_convert=["lm_head", "o_proj", "model.layers.0"])
    chosen = {name for name in everything if not name.endswith("o_proj") and ".0." not in name}
    assert compressed_layers(load(folder, quantization_config=config)) == chosen
    with pytest.warns(UserWarning, match="21 layers stay dense"):
        none = load(folder, quantization_config=BitmaskConfig(min_sparsity=0.9))
    assert compressed_layers(none) == set()
    with pytest.warns(UserWarning, match="no linear layer of the model matches 'k_poj'"):
        load(folder, quantization_config=BitmaskConfig(modules_to_not_convert=["lm_head", "k_poj"]))
    config = BitmaskConfig(modules_to_not_convert=[], min_sparsity=0.0)
    assert compressed_layers(load(folder, quantization_config=config)) == {*everything, "lm_head"}


@pytest.mark.parametrize(
    "arguments",
    [
        {"modules_to_not_convert": "lm_head"},
        {"modules_to_not_convert": [1]},
        {"modules_to_not_convert": ["lm_head", "*.q_proj"]},
        {"min_sparsity": 1.5},
        {"version": 2},
        {"version": "1"},
        {"bits": 4},
        {"quant_method": "awq"},
    ],
    ids=str,
)
def test_a_configuration_that_is_not_understood_is_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments)).replace("quant_method", "awq")):
        BitmaskConfig(**arguments)


def test_a_later_version_is_refused_when_a_checkpoint_is_loaded(compressed, tmp_path):
    shutil.copytree(compressed, tmp_path / "later")
    config = json.loads((compressed / "config.json").read_text())
    config["quantization_config"]["version"] = 2
    (tmp_path / "later" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="version 2 of the format"):
        load(tmp_path / "later")


def test_offloading_to_disk_is_refused(dense, compressed, tmp_path):
    device_map = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    device_map["model.rotary_emb"] = "cpu"
    for folder, settings in ((dense[1], {"quantization_config": BitmaskConfig()}), (compressed, {})):
        with pytest.raises(ValueError, match=r"offloaded to disk.* device_map has 'disk' for 'model\.layers'"):
            load(folder, device_map=device_map, offload_folder=tmp_path, **settings)


def test_another_methods_configuration_is_refused(compressed):
    with pytest.raises(ValueError, match="quantized with BitmaskConfig"):
        load(compressed, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


@pytest.mark.parametrize(
    ("class_name", "settings"),
    [
        ("GPT2LMHeadModel", {"vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}),
        (
            "BertForMaskedLM",
            {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 48, "max_position_embeddings": 32},
        ),
        (
            "T5ForConditionalGeneration",
            {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
             "decoder_start_token_id": 0},
        ),
    ],
)  # fmt: skip
def test_other_architectures(class_name, settings, tmp_path):
    model = tiny(class_name, **settings)
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and "head" not in name and "decoder" != name.split(".")[-1]:
            prune_(layer.weight, "0.5")
    model.save_pretrained(tmp_path / "dense")
    loaded = type(model).from_pretrained(tmp_path / "dense", quantization_config=BitmaskConfig(min_sparsity=0.2))
    inputs = {"input_ids": IDS, **({"decoder_input_ids": IDS} if class_name.startswith("T5") else {})}
    loaded.save_pretrained(tmp_path / "compressed")
    for one in (loaded, type(model).from_pretrained(tmp_path / "compressed")):
        assert torch.allclose(one(**inputs).logits, model(**inputs).logits, atol=1e-5)
        assert same_tensors(one.dequantize().state_dict(), model.state_dict())


def test_an_adapter_finds_its_compressed_base(compressed, dense, tmp_path):
    torch.manual_seed(0)
    peft_model = get_peft_model(load(compressed), SPPConfig(r=4, task_type="CAUSAL_LM", init_weights=False))
    peft_model.eval().save_pretrained(tmp_path)
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert compressed_layers(again)
    assert torch.equal(again(IDS).logits, peft_model(IDS).logits)
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert same_tensors(
        load(tmp_path / "merged").dequantize().state_dict(), copy.deepcopy(merged).dequantize().state_dict()
    )


_WITHOUT = """
import sys, logging
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except RuntimeError as error:
    print("refused", "ignore_mismatched_sizes" in str(error))
assert "peft_spp" not in sys.modules
"""


def test_without_peft_spp_a_compressed_model_does_not_load_as_random_weights(compressed):
    result = subprocess.run(
        [sys.executable, "-c", _WITHOUT, str(compressed)], capture_output=True, text=True, timeout=300
    )
    assert result.stdout.strip() == "refused True", result.stderr
    assert "Unknown quantization type, got bitmask" in result.stderr
    assert "MISMATCH" in result.stderr


def test_float64_is_refused_where_it_is_saved_and_where_it_is_loaded(tmp_path):
    model = peft_spp.compress(pruned_llama())
    model.save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match=r"pass dtype=torch\.float32"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float64)
    with pytest.raises(ValueError, match=r"is compressed and in torch\.float64.*model\.to\(torch\.float32\)"):
        model.to(torch.float64).save_pretrained(tmp_path / "again")
    model.to(torch.float32).save_pretrained(tmp_path / "again")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert same_tensors(loaded.state_dict(), model.state_dict())
