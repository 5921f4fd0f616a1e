# SPDX-License-Identifier: Apache-2.0
"""Other methods of PEFT on compressed layers: they train as on dense ones or are refused, and no merge fills zeros."""

import copy

import peft
import pytest
import torch
from peft import (
    BeftConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
)
from torch import nn

import peft_spp
from peft_spp import CompressedLinear, SPPConfig
from peft_spp.compressed.other_adapters import TRAIN

from helpers.compressed_cases import IDS, pruned_llama, same_tensors
from helpers.tiny import MLP, prune_


TARGETS = ["q_proj", "down_proj"]
WORKING = {
    "ADALORA": ("AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 10}),
    "BEFT": ("BeftConfig", {}),
    "BOFT": ("BOFTConfig", {"boft_block_size": 4}),
    "C3A": ("C3AConfig", {"block_size": 8}),
    "FOURIERFT": ("FourierFTConfig", {"n_frequency": 8}),
    "GRALORA": ("GraloraConfig", {"r": 4}),
    "IA3": ("IA3Config", {"feedforward_modules": ["down_proj"]}),
    "LORA": ("LoraConfig", {"init_lora_weights": "orthogonal", "r": 4}),
    "MISS": ("MissConfig", {"r": 4}),
    "OFT": ("OFTConfig", {"oft_block_size": 4}),
    "PVERA": ("PveraConfig", {}),
    "RANDLORA": ("RandLoraConfig", {"r": 4}),
    "ROAD": ("RoadConfig", {"group_size": 4}),
    "SPP": (SPPConfig, {}),
    "UNILORA": ("UniLoraConfig", {}),
    "VBLORA": ("VBLoRAConfig", {"vector_length": 2, "num_vectors": 16, "topk": 2}),
    "VERA": ("VeraConfig", {"r": 4}),
    "WAVEFT": ("WaveFTConfig", {"n_frequency": 8}),
}
REFUSED = [
    ("LoraConfig", {"use_dora": True}, "use_dora"),
    ("LoraConfig", {"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    ("LoraConfig", {"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
    ("HiraConfig", {}, "the method HIRA"),
    ("SupertuningConfig", {"sparsity": 0.9}, "the method SUPERTUNING"),
    ("DeloraConfig", {}, "the method DELORA"),
    ("LoHaConfig", {}, "the method LOHA"),
    ("FrodConfig", {}, "the method FROD"),
    ("OSFConfig", {}, "the method OSF"),
    ("ShiraConfig", {"r": 2}, "the method SHIRA"),
]


def config_of(cls, **settings):
    cls = getattr(peft, cls) if isinstance(cls, str) else cls
    return cls(**{"target_modules": TARGETS, **settings})


def trainable(model):
    return {name: one for name, one in model.named_parameters() if one.requires_grad}


def lora(base, **settings):
    torch.manual_seed(3)
    config = {"target_modules": [*TARGETS, "lm_head"], "init_lora_weights": False, **settings}
    return get_peft_model(base, LoraConfig(**config))


def unchanged(model, before):
    return same_tensors(dict(model.state_dict()), before)


def state(model):
    return {name: one.clone() for name, one in model.state_dict().items()}


@pytest.mark.parametrize("method", sorted(TRAIN))
def test_what_is_known_to_work_computes_and_trains_as_on_the_dense_model(method):
    cls, settings = WORKING[method]
    base = pruned_llama()
    models = []
    for one in (base, peft_spp.compress(copy.deepcopy(base))):
        torch.manual_seed(0)
        models.append(get_peft_model(one, config_of(cls, **settings)).eval())
    dense, small = (trainable(one) for one in models)
    assert dense.keys() == small.keys() and dense
    torch.manual_seed(1)
    with torch.no_grad():
        for name, one in dense.items():
            one.add_(torch.randn_like(one), alpha=0.1)
            small[name].copy_(one)
    results = [one(input_ids=IDS, labels=IDS) for one in models]
    for result in results:
        result.loss.backward()
    torch.testing.assert_close(results[1].logits, results[0].logits, rtol=1e-4, atol=1e-5)
    for name, one in dense.items():
        torch.testing.assert_close(small[name].grad, one.grad, rtol=1e-3, atol=1e-4, msg=name)
    assert any(one.grad is not None and one.grad.any() for one in small.values())


def test_adalora_prunes_ranks_as_on_the_dense_model():
    base = pruned_llama()
    models = []
    for one in (base, peft_spp.compress(copy.deepcopy(base))):
        torch.manual_seed(0)
        model = get_peft_model(one, config_of("AdaLoraConfig", **WORKING["ADALORA"][1], tinit=1, tfinal=2))
        optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
        for step in range(8):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
        models.append(model)
    assert any(
        not pattern.all() for pattern in (one for name, one in trainable(models[0]).items() if "lora_E" in name)
    )
    torch.testing.assert_close(models[1](IDS).logits, models[0](IDS).logits, rtol=1e-4, atol=1e-5)
    for name, one in trainable(models[0]).items():
        torch.testing.assert_close(trainable(models[1])[name], one, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(("cls", "settings", "what"), REFUSED)
def test_what_reads_the_weight_is_refused_before_anything_changes(cls, settings, what):
    model = peft_spp.compress(pruned_llama(), modules_to_not_convert=["lm_head", "model.layers.0"])
    before = [(name, type(one)) for name, one in model.named_modules()]
    grads = trainable(model).keys()
    name = r"model\.layers\.1\.self_attn\.q_proj"
    with pytest.raises(ValueError, match=rf"{what} cannot train on {name}.*peft_spp\.decompress"):
        get_peft_model(model, config_of(cls, **settings))
    assert [(name, type(one)) for name, one in model.named_modules()] == before
    assert trainable(model).keys() == grads
    # the way out that the error names, and layers that are dense
    get_peft_model(copy.deepcopy(model), config_of(cls, **settings, target_modules=r".*\.layers\.0\..*q_proj"))
    get_peft_model(peft_spp.decompress(model), config_of(cls, **settings))


def test_a_second_adapter_that_reads_the_weight_is_refused_too():
    model = get_peft_model(peft_spp.compress(pruned_llama()), LoraConfig(target_modules=TARGETS))
    with pytest.raises(ValueError, match=r"use_dora cannot train on model\.layers\.0\.self_attn\.q_proj"):
        model.add_adapter("second", LoraConfig(target_modules=TARGETS, use_dora=True))
    with pytest.raises(ValueError, match="use_dora cannot train on 0"):
        inject_adapter_in_model(
            LoraConfig(target_modules=["0"], use_dora=True),
            nn.Sequential(CompressedLinear.from_linear(nn.Linear(8, 8))),
        )


@pytest.mark.parametrize("config", [LoraConfig, SPPConfig])
@pytest.mark.parametrize("saved", ["k_proj", "self_attn"])
def test_a_copy_of_a_compressed_layer_is_not_trained_without_a_word(config, saved):
    model = peft_spp.compress(pruned_llama())
    before = state(model)
    with pytest.raises(ValueError, match=rf"modules_to_save has '{saved}'.*layers\.0\.self_attn\.[qk]_proj"):
        get_peft_model(model, config(target_modules=["down_proj"], modules_to_save=[saved]))
    assert unchanged(model, before)
    get_peft_model(model, config(target_modules=["down_proj"], modules_to_save=["lm_head"]))


def test_norms_are_tuned_and_merged_around_compressed_layers():
    model = peft_spp.compress(pruned_llama())
    model = get_peft_model(model, LNTuningConfig(target_modules=["input_layernorm"]))
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(one.grad is not None for one in trainable(model).values())
    expected = model(IDS).logits
    torch.testing.assert_close(model.merge_and_unload()(IDS).logits, expected)


def merge_layer(model, **settings):
    # as diffusers' fuse_lora does
    model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj").merge(**settings)


MERGES = {
    "layer": merge_layer,
    "merge_and_unload": lambda model, **settings: model.merge_and_unload(**settings),
    "merge_adapter": lambda model, **settings: model.merge_adapter(**settings),
}


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=TARGETS, init_lora_weights=False),
        # the product of the values and a column is a matrix: without a check, it is taken for the weight
        IA3Config(target_modules=["q_proj"], feedforward_modules=[], init_ia3_weights=False),
    ],
    ids=["lora", "ia3"],
)
def test_a_merge_is_refused_by_name_before_anything_changes(merge, safe, config):
    base = peft_spp.compress(pruned_llama(), modules_to_not_convert=["lm_head", "model.layers.0"])
    model = get_peft_model(base, copy.deepcopy(config))
    before, logits = state(model), model(IDS).logits
    message = r"adapter of model\.layers\.1\.self_attn\.q_proj.*unmerged.*peft_spp\.decompress\(model\)"
    with pytest.raises(ValueError, match=message):
        MERGES[merge](model, safe_merge=safe)
    assert unchanged(model, before)
    assert torch.equal(model(IDS).logits, logits)


def test_a_mixed_model_is_refused_too():
    model = PeftMixedModel(
        peft_spp.compress(pruned_llama()), LoraConfig(target_modules=TARGETS, init_lora_weights=False)
    )
    before = state(model)
    with pytest.raises(ValueError, match=r"cannot merge the adapter of model\.layers\.0"):
        model.merge_and_unload()
    assert unchanged(model, before)


def test_a_decompressed_model_keeps_its_adapter_and_merges_it():
    base = pruned_llama()
    expected = lora(copy.deepcopy(base)).merge_and_unload()
    model = lora(peft_spp.compress(copy.deepcopy(base)))
    logits = model(IDS).logits
    assert peft_spp.decompress(model) is model
    assert not any(isinstance(one, CompressedLinear) for one in model.modules())
    torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-4, atol=1e-5)
    merged = model.merge_and_unload()
    assert same_tensors(merged.state_dict(), expected.state_dict())
    assert not merged.is_quantized


def test_an_adapter_moves_between_a_dense_and_a_compressed_base(tmp_path):
    base = pruned_llama()
    model = lora(peft_spp.compress(copy.deepcopy(base)))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)
    # and without it the compressed model is there again
    assert isinstance(model.unload().model.layers[0].self_attn.q_proj, CompressedLinear)


def test_adapters_on_dense_layers_of_a_compressed_model_are_merged():
    base = peft_spp.compress(pruned_llama())
    model = lora(base, target_modules=["lm_head"])
    expected = model(IDS).logits
    torch.testing.assert_close(model.merge_and_unload()(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_biases_are_merged_into_compressed_layers():
    model = MLP()
    for layer in (model.lin0, model.lin1):
        prune_(layer.weight, "0.5")
    model = get_peft_model(peft_spp.compress(model), BeftConfig(target_modules=["lin0"]))
    with torch.no_grad():
        model.base_model.model.lin0.beft_bias["default"].normal_()
    x = torch.randn(3, 12)
    expected = model(x)
    merged = model.merge_and_unload()
    assert isinstance(merged.lin0, CompressedLinear)
    torch.testing.assert_close(merged(x), expected)


def test_dense_models_are_not_concerned():
    model = lora(pruned_llama(), use_dora=True)
    expected = model(IDS).logits
    torch.testing.assert_close(model.merge_and_unload()(IDS).logits, expected, rtol=1e-4, atol=1e-4)
