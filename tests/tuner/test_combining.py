# SPDX-License-Identifier: Apache-2.0
"""Several adapters as one: exactly, while all are active, and by the nearest single adapter."""

import pytest
import torch
from accelerate import cpu_offload
from peft import PeftModel, get_peft_model

from peft_spp import SPPConfig
from peft_spp.functional import Factors

from helpers.reference import effective_weight, linear
from helpers.tiny import MLP, randomize, tiny_llama
from helpers.tiny_moe import IDS, MOE, PARAMETERS, oriented_experts, tiny_moe


# name: configuration, weight
ADAPTERS = {
    "first": (dict(r=3, spp_alpha=5, target_modules=["lin0", "lin1"]), 0.7),
    "second": (dict(r=4, spp_alpha=8, target_modules=["lin0"], rank_pattern={"lin0": 7}), -1.25),
    "third": (dict(r=3, spp_alpha=2, target_modules=["lin1"], alpha_pattern={"lin1": 9}), 2.0),
}
NAMES = list(ADAPTERS)
WEIGHTS = [weight for _, weight in ADAPTERS.values()]


def combined_mlp(dtype=torch.float64):
    torch.manual_seed(0)
    model = None
    for name, (settings, _) in ADAPTERS.items():
        if model is None:
            model = get_peft_model(MLP(), SPPConfig(**settings), adapter_name=name)
        else:
            model.add_adapter(name, SPPConfig(**settings))
    randomize(model)
    return model.to(dtype).eval()


def layers(model):
    return {name: model.base_model.model.get_submodule(name) for name in ("lin0", "lin1")}


def weighted_factors(layer):
    """The factors with the scaling written out from the configurations above."""
    factors = []
    for name, (settings, weight) in ADAPTERS.items():
        if name in layer.spp_A:
            A, B = layer.spp_A[name].weight, layer.spp_B[name].weight
            alpha = settings.get("alpha_pattern", {}).get(layer.module_name, settings["spp_alpha"])
            factors.append(Factors(A, B, weight * alpha / A.shape[0]))
    return factors


def reference_forward(model, x, factors_of):
    lin0, lin1 = layers(model).values()
    hidden = linear(x, lin0.get_base_layer().weight, lin0.get_base_layer().bias, factors_of(lin0)).relu()
    return linear(hidden, lin1.get_base_layer().weight, lin1.get_base_layer().bias, factors_of(lin1))


X = torch.linspace(-1, 1, 36, dtype=torch.float64).view(3, 12)


def test_active_adapters_with_weights_are_the_exact_sum():
    model = combined_mlp()
    model.set_weighted_adapters(NAMES, WEIGHTS)
    assert model.active_adapters == NAMES
    expected = reference_forward(model, X, weighted_factors)
    torch.testing.assert_close(model(X), expected, atol=1e-12, rtol=1e-12)
    weights = {
        name: effective_weight(layer.get_base_layer().weight, weighted_factors(layer))
        for name, layer in layers(model).items()
    }
    merged = model.merge_and_unload()
    for name, weight in weights.items():
        torch.testing.assert_close(merged.get_submodule(name).weight.data, weight, atol=1e-13, rtol=1e-13)


def test_weights_of_one_bring_the_adapters_back():
    model = combined_mlp()
    model.set_weighted_adapters(["first", "third"], [1.0, 1.0])
    expected = model(X)
    model.set_weighted_adapters(["first", "third"], [0.3, -4.0])
    assert not torch.allclose(model(X), expected)
    model.set_weighted_adapters(["first", "third"], [1.0, 1.0])
    assert torch.equal(model(X), expected)


def test_a_layer_is_scaled_as_a_layer_of_lora():
    model = combined_mlp()
    lin0 = layers(model)["lin0"]
    lin0.set_scale("first", 3.0)
    assert lin0.scaling["first"] == 3 * 5 / 3
    lin0.scale_layer(0.5)
    assert lin0.scaling == {"first": 2.5, "second": 8 / 7}
    lin0.unscale_layer(0.25)
    assert lin0.scaling["first"] == 10
    lin0.unscale_layer()
    assert lin0.scaling["first"] == 5 / 3
    lin0.set_scale("nobody", 2.0)
    assert set(lin0.scaling) == {"first", "second"}


@pytest.mark.parametrize("svd_rank", [None, 2, 20])
def test_the_nearest_adapter_has_the_error_that_is_reported(svd_rank):
    model = combined_mlp()
    model.set_weighted_adapters(NAMES, [5.0, 5.0, 5.0])  # weights that are set elsewhere do not count
    errors = model.add_weighted_adapter(NAMES, WEIGHTS, "sum", svd_rank=svd_rank)
    assert errors.keys() == layers(model).keys()
    for name, layer in layers(model).items():
        A, B = layer.spp_A["sum"].weight, layer.spp_B["sum"].weight
        assert A.shape[0] == min(svd_rank or 7, layer.out_features)
        ones = torch.ones(layer.out_features, layer.in_features)
        total = effective_weight(ones, weighted_factors(layer), identity=False)
        close = effective_weight(ones, [Factors(A, B, layer.scaling["sum"])], identity=False)
        # float32, as new factors are
        assert ((total - close).norm() / total.norm()).item() == pytest.approx(errors[name], abs=1e-6)
        if A.shape[0] == layer.out_features:
            assert errors[name] < 1e-7
    assert max(errors.values()) > 0.1 or svd_rank == 20
    model.set_adapter("sum")
    expected = reference_forward(
        model, X, lambda one: [Factors(one.spp_A["sum"].weight, one.spp_B["sum"].weight, one.scaling["sum"])]
    )
    torch.testing.assert_close(model(X), expected, atol=1e-6, rtol=1e-6)


def test_the_new_adapter_is_frozen_and_saved_like_any_other(tmp_path):
    model = get_peft_model(tiny_llama(), SPPConfig(r=4, layers_to_transform=[0], task_type="CAUSAL_LM"), "first")
    model.add_adapter("second", SPPConfig(r=5, layers_to_transform=[0, 2], task_type="CAUSAL_LM"))
    randomize(model)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    errors = model.add_weighted_adapter(["first", "second"], [0.5, 0.5], "sum")
    assert model.active_adapters == ["first"]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable
    assert {int(name.split(".")[2]) for name in errors} == {0, 2}
    # layer 2 has one adapter alone, whose five blocks the new one has as well
    assert all(error < 1e-7 for name, error in errors.items() if ".2." in name)
    model.set_adapter("sum")
    ids = torch.arange(10).view(1, 10)
    expected = model.eval()(input_ids=ids).logits
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "sum").eval()
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected)
    model.set_weighted_adapters(["first", "second"], [0.5, 0.5])
    exact = model(input_ids=ids).logits
    assert not torch.allclose(exact, expected, atol=1e-3)


@pytest.mark.parametrize("name", list(MOE))
def test_experts_are_combined_each_on_its_own(name, tmp_path):
    settings = {"target_modules": ["q_proj"], "target_parameters": PARAMETERS}
    model = get_peft_model(tiny_moe(name), SPPConfig(r=5, **settings), "first").eval()
    model.add_adapter("second", SPPConfig(r=3, **{**settings, "target_modules": ["k_proj"]}))
    randomize(model)
    weights = {"first": 0.7, "second": -1.25}
    errors = model.add_weighted_adapter(list(weights), list(weights.values()), "sum", svd_rank=4)
    layers = {m.module_name: m for m in model.modules() if hasattr(m, "spp_A") and "sum" in m.spp_A}
    assert errors.keys() == layers.keys() and len(layers) == 2 * 4
    for key, stack in oriented_experts(model, name).items():
        layer, totals, closes = layers[key], [], []
        for e, weight in enumerate(stack):

            def factors(adapter, e=e, layer=layer):
                A, B = (
                    getattr(layer, part)[adapter].weight.chunk(layer.num_experts)[e] for part in ("spp_A", "spp_B")
                )
                return Factors(A, B, weights.get(adapter, 1.0) * layer.scaling[adapter])

            ones = torch.ones_like(weight)
            totals.append(effective_weight(ones, [factors("first"), factors("second")], identity=False))
            closes.append(effective_weight(ones, [factors("sum")], identity=False))
        total, close = torch.stack(totals), torch.stack(closes)
        assert ((total - close).norm() / total.norm()).item() == pytest.approx(errors[key], abs=1e-6)
        assert 0.05 < errors[key] < 1
    model.set_adapter("sum")
    expected = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(tiny_moe(name), tmp_path / "sum").eval()
    torch.testing.assert_close(loaded(input_ids=IDS).logits, expected)


def snapshot(model):
    return (
        {name: p.detach().clone() for name, p in model.named_parameters()},
        {name: dict(layer.scaling) for name, layer in layers(model).items()},
        dict(model.peft_config),
        model.active_adapters,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["first", "nobody"], [1.0, 1.0], "sum"), "nobody"),
        ((["first", "second"], [1.0], "sum"), "weight for each"),
        ((["first", "first"], [1.0, 1.0], "sum"), "different"),
        (([], [], "sum"), "Pass different adapters"),
        ((["first", "second"], [1.0, float("nan")], "sum"), "nan"),
        ((["first", "second"], [1.0, 1.0], "third"), "third"),
        ((["first", "second"], [1.0, 1.0], "a.b"), "'a.b' is empty or has a dot"),
        ((["first", "second"], [1.0, 1.0], "sum", "linear"), "linear"),
        ((["first", "second"], [1.0, 1.0], "sum", "rank_one_svd", -1), "svd_rank"),
    ],
)
def test_what_cannot_be_combined_changes_nothing(arguments, message):
    model = combined_mlp()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(*arguments)
    after = snapshot(model)
    assert before[1:] == after[1:] and before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])


def test_a_broken_adapter_is_named_with_the_module():
    model = combined_mlp()
    with torch.no_grad():
        layers(model)["lin1"].spp_A["third"].weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"(?s)third.*lin1"):
        model.add_weighted_adapter(NAMES, WEIGHTS, "sum")
    assert list(model.peft_config) == NAMES


def test_an_adapter_that_is_not_in_memory_is_named_with_the_module():
    model = cpu_offload(combined_mlp(), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"'first' has no values in memory in 'lin0': load the model without"):
        model.add_weighted_adapter(NAMES, WEIGHTS, "sum")
    assert list(model.peft_config) == NAMES


def test_trained_modules_are_not_added_up():
    model = get_peft_model(MLP(), SPPConfig(r=2, target_modules=["lin0"], modules_to_save=["lin1"]))
    with pytest.raises(ValueError, match="modules_to_save"):
        model.add_weighted_adapter(["default"], [2.0], "sum")


def test_merged_adapters_keep_their_weight():
    model = combined_mlp()
    model.merge_adapter(["first"])
    before = {name: dict(layer.scaling) for name, layer in layers(model).items()}
    with pytest.raises(ValueError, match="unmerge"):
        model.set_weighted_adapters(["second", "first"], [2.0, 2.0])
    assert {name: dict(layer.scaling) for name, layer in layers(model).items()} == before
    with pytest.raises(ValueError, match="nobody"):
        model.set_weighted_adapters(["second", "nobody"], [2.0, 2.0])
