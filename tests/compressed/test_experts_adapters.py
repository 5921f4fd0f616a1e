# SPDX-License-Identifier: Apache-2.0
"""SPP on experts whose zeros are not stored: as on dense ones, and merged in place."""

import copy
import itertools

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model

import peft_spp
from peft_spp import SPPConfig, hotswap_adapter, prepare_model_for_compiled_hotswap
from peft_spp.compressed.experts import CompressedExperts
from peft_spp.functional.bitmask import Compressed, stored_places
from peft_spp.functional.compressed_stack import CompressedStack
from peft_spp.tuner import ParamWrapper
from peft_spp.tuner.base_record import record_base

from helpers.compressed_cases import same_bits, same_tensors, tensors_of
from helpers.mixtures import expert_weights, mixture
from helpers.tiny import prune_, randomize
from helpers.tiny_moe import IDS


KINDS = ["mixtral", "qwen2_moe", "gpt_oss", "llama4_text"]
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}

pytestmark = pytest.mark.filterwarnings("ignore:.*stay dense")  # the routers of Llama 4


def pruned(kind, dtype=torch.float32):
    model = mixture(kind, dtype).eval()
    for weight in expert_weights(model).values():
        prune_(weight, "0.5")
    return model


def adapted(model, r=5, adapters=("default",), **settings):
    """A PEFT model with random factors on all experts."""
    config = {"target_modules": [], "target_parameters": PARAMETERS, "r": r, **settings}
    first, *others = adapters
    model = get_peft_model(model, SPPConfig(**config), adapter_name=first).eval()
    for name in others:
        model.add_adapter(name, SPPConfig(**{**config, "r": 3}))
    torch.manual_seed(1)
    randomize(model)
    model.base_model.set_adapter(list(adapters))
    return model


def pair(kind, dtype=torch.float32, **settings):
    """The same adapters on dense experts, and on the same compressed."""
    model = pruned(kind, dtype)
    return adapted(copy.deepcopy(model), **settings), adapted(peft_spp.compress(model), **settings)


def compressed_stacks(model):
    experts = [module for module in model.modules() if isinstance(module, CompressedExperts)]
    return [module.compressed(name) for module in experts for name in module.stacks]


@pytest.fixture
def made_dense(monkeypatch):
    """Counts how often a whole stack is made dense in a forward pass."""
    calls, dense = [], CompressedStack.dense
    monkeypatch.setattr(CompressedStack, "dense", lambda self: (calls.append(self), dense(self))[1])
    return calls


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_losses_and_gradients_are_those_on_dense_experts(kind, implementation, dtype, made_dense):
    dense, small = pair(kind, dtype, adapters=("default", "other"))
    results = []
    for model in (dense, small):
        if kind != "llama4_text":
            model.get_base_model().set_experts_implementation(implementation)
        embeddings = model.get_base_model().get_input_embeddings().weight.requires_grad_()
        result = model.train()(input_ids=IDS, labels=IDS)
        result.loss.backward()
        gradients = {name: one.grad for name, one in model.named_parameters() if "spp_" in name}
        results.append((result, {**gradients, "x": embeddings.grad}))
    (expected, gradients), (actual, own) = results
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(actual.loss, expected.loss, rtol=tolerance, atol=tolerance)
    assert gradients.keys() == own.keys() and len(own) > 8
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
        # a token that two roundings send to another expert changes more than a rounding
        limit = 10 * tolerance if dtype == torch.float32 else 0.3
        assert (own[name].double() - gradient.double()).norm() <= limit * gradient.double().norm(), name
    assert not made_dense


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_is_the_identity(kind):
    base = peft_spp.compress(pruned(kind))
    expected = base(input_ids=IDS).logits
    model = get_peft_model(base, SPPConfig(target_modules=[], target_parameters=PARAMETERS, r=4))
    if kind in ("gpt_oss", "llama4_text"):  # stored inputs first, they are made dense either way
        assert torch.equal(model(input_ids=IDS).logits, expected)
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-6, atol=2e-6)
    before = [one.values.clone() for one in compressed_stacks(model)]
    after = compressed_stacks(model.merge_and_unload())
    assert all(same_bits(one, weight.values) for one, weight in zip(before, after, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_merge_has_the_bits_of_a_dense_one_and_stays_compressed(kind, dtype):
    dense, small = pair(kind, dtype, adapters=("default", "other"))
    parameters = {id(one) for one in small.get_base_model().parameters()}
    assert compressed_stacks(small)
    before = [weight.bitmask.clone() for weight in compressed_stacks(small)]
    merged = small.merge_and_unload()
    after = compressed_stacks(merged)
    assert all(torch.equal(one, weight.bitmask) for one, weight in zip(before, after, strict=True))
    # in place: whoever holds the parameter sees the new values
    assert all(id(weight.values) in parameters for weight in after)
    assert same_tensors(peft_spp.decompress(merged).state_dict(), dense.merge_and_unload().state_dict())


@pytest.mark.parametrize("kind", ["qwen2_moe", "gpt_oss"])
def test_unmerge_restores_every_bit_and_merges_add_up_in_any_order(kind):
    _, model = pair(kind, adapters=("default", "other"))
    before = [weight.values.clone() for weight in compressed_stacks(model)]
    expected = model(input_ids=IDS).logits
    merged = []
    for order in itertools.permutations(["default", "other"]):
        for adapter in order:
            model.merge_adapter([adapter])
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)
        merged.append([weight.values.clone() for weight in compressed_stacks(model)])
        model.unmerge_adapter()
        assert all(same_bits(a, b.values) for a, b in zip(before, compressed_stacks(model), strict=True))
    assert all(same_bits(a, b) for a, b in zip(*merged, strict=True))


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_a_merge_of_a_broken_adapter_is_refused_and_changes_nothing(kind):
    _, model = pair(kind)
    before = [weight.values.clone() for weight in compressed_stacks(model)]
    next(one for name, one in reversed(list(model.named_parameters())) if "spp_B" in name).data[3] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True)
    assert all(same_bits(a, b.values) for a, b in zip(before, compressed_stacks(model), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_saved_adapters_can_be_exchanged_with_the_dense_base(kind, tmp_path):
    dense, small = pair(kind)
    for name, model in (("dense", dense), ("small", small)):
        model.save_pretrained(tmp_path / name)
    assert same_tensors(tensors_of(tmp_path / "dense"), tensors_of(tmp_path / "small"))
    masks = [(tmp_path / name / "base_masks.json").read_text() for name in ("dense", "small")]
    assert masks[0].split('"modules"')[-1] == masks[1].split('"modules"')[-1]
    expected = dense(input_ids=IDS).logits
    for base, saved in ((peft_spp.compress(pruned(kind)), "dense"), (pruned(kind), "small")):
        loaded = PeftModel.from_pretrained(base, tmp_path / saved, check_base="error").eval()
        torch.testing.assert_close(loaded(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)
        assert set(loaded.base_model.relate_base().values()) == {"same"}
    other = pruned(kind)
    for weight in expert_weights(other).values():
        prune_(weight, "0.75")
        weight.neg_()
    loaded = PeftModel.from_pretrained(peft_spp.compress(other), tmp_path / "small", check_base="off")
    assert set(loaded.base_model.relate_base().values()) <= {"refined", "different"}


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_the_mask_is_recorded_from_the_bitmask(kind):
    dense, small = pair(kind)
    names = [name for name, one in small.named_modules() if isinstance(one, ParamWrapper)]
    for name in names:
        weight, expected = small.get_submodule(name).recorded_weight(), dense.get_submodule(name).recorded_weight()
        assert isinstance(weight, Compressed) and weight.shape == expected.shape
        assert torch.equal(stored_places(weight), expected != 0)
    # a stored zero is a zero
    records = []
    stacks = [one for one in dense.parameters() if one.ndim == 3]
    for model, weights in ((dense, stacks), (small, [one.values for one in compressed_stacks(small)])):
        for weight in weights:
            weight.data[weight.abs() < 0.1] = -0.0
        records.append(record_base(model, "default").masks)
    assert records[0] == records[1] and len(records[0]) == 4


def test_linear_layers_and_experts_together_and_a_dense_model_at_the_end():
    model = pruned("qwen3_moe")
    dense = get_peft_model(copy.deepcopy(model), SPPConfig(r=4, target_parameters=PARAMETERS))
    small = get_peft_model(peft_spp.compress(model), SPPConfig(r=4, target_parameters=PARAMETERS))
    for one in (dense, small):
        torch.manual_seed(1)
        randomize(one.eval())
    torch.testing.assert_close(small(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-5)
    merged = small.merge_and_unload(dequantize=True)
    assert not compressed_stacks(merged)
    assert same_tensors(merged.state_dict(), dense.merge_and_unload().state_dict())


def test_the_default_targets_warn_of_compressed_experts():
    with pytest.warns(UserWarning, match=r"4 parameters with the weights of experts, which are not adapted"):
        get_peft_model(peft_spp.compress(pruned("mixtral")), SPPConfig(r=4))


def test_other_methods_are_refused_on_compressed_experts_and_work_next_to_them():
    base = peft_spp.compress(pruned("mixtral"))
    with pytest.raises(ValueError, match=r"LORA cannot .*layers\.0\.mlp\.experts\.\w+, .* compressed"):
        get_peft_model(base, LoraConfig(target_modules=[], target_parameters=PARAMETERS))
    with pytest.raises(ValueError, match=r"modules_to_save has 'experts', and the weight of .*experts\.\w+ is"):
        get_peft_model(base, LoraConfig(target_modules=["q_proj"], modules_to_save=["experts"]))
    assert not any("lora" in name for name, _ in base.named_parameters())
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"]))
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert all(one.grad is not None for name, one in model.named_parameters() if "lora" in name)


def test_offloaded_experts_compute_and_merge():
    dense, small = pair("qwen2_moe")
    expected = dense(input_ids=IDS).logits
    cpu_offload(small.get_base_model(), execution_device=torch.device("cpu"))
    torch.testing.assert_close(small(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)
    small.merge_adapter()
    torch.testing.assert_close(small(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_sums_of_adapters_are_those_on_dense_experts(kind):
    dense, small = pair(kind, adapters=("default", "other"))
    weights = {"default": 0.7, "other": -1.25}
    outputs, errors = [], []
    for model in (dense, small):
        names, factors = list(weights), list(weights.values())
        model.set_weighted_adapters(names, factors)
        exact = model(input_ids=IDS).logits
        errors.append(model.add_weighted_adapter(names, factors, "sum", svd_rank=4))
        model.set_adapter("sum")
        nearest = model(input_ids=IDS).logits
        layers = [one for one in model.modules() if isinstance(one, ParamWrapper)]
        for layer in layers:
            layer.set_scale("sum", 0.3)
        scaled = model(input_ids=IDS).logits
        with model.disable_adapter():
            base = model(input_ids=IDS).logits
        deltas = [layer.get_delta_weight("sum") for layer in layers]
        model.delete_adapter("sum")
        model.set_weighted_adapters(names, factors)
        merged = model.merge_and_unload()
        outputs.append([exact, nearest, scaled, base, *deltas, merged(input_ids=IDS).logits])
    assert errors[0] == errors[1]
    for expected, actual in zip(*outputs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    exact, nearest, scaled, base, *_ = outputs[1]
    assert all(
        not torch.allclose(a, b, atol=1e-3) for a, b in itertools.combinations((exact, nearest, scaled, base), 2)
    )
    assert same_tensors(peft_spp.decompress(small.get_base_model()).state_dict(), dense.get_base_model().state_dict())


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts_are_swapped_in_place(kind, tmp_path):
    others, expected = [], []
    for number, r in enumerate((2, 8)):
        model = adapted(pruned(kind), r=r)
        randomize(model)
        model.save_pretrained(tmp_path / str(number))
        others.append(tmp_path / str(number))
        expected.append(model(input_ids=IDS).logits)
    small = PeftModel.from_pretrained(peft_spp.compress(pruned(kind)), others[0]).eval()
    prepare_model_for_compiled_hotswap(small, target_rank=8)
    before = {name: one.data_ptr() for name, one in small.named_parameters()}
    for number in (1, 0):
        hotswap_adapter(small, others[number], "default")
        torch.testing.assert_close(small(input_ids=IDS).logits, expected[number], rtol=1e-5, atol=1e-5)
    assert {name: one.data_ptr() for name, one in small.named_parameters()} == before
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)
    small.merge_adapter()
    with pytest.raises(ValueError, match="it is merged"):
        hotswap_adapter(small, others[1], "default")


def test_batches_that_mix_adapters_are_refused_and_autocast_computes_in_its_dtype():
    dense, small = pair("mixtral", adapters=("default", "other"))
    for model in (dense, small):
        with pytest.raises(ValueError, match="does not support mixed adapter batches"):
            model(input_ids=IDS, adapter_names=["default", "other"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = [model(input_ids=IDS).logits.float() for model in (dense, small)]
    torch.testing.assert_close(results[1], results[0], rtol=5e-2, atol=5e-2)
