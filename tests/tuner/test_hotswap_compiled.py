# SPDX-License-Identifier: Apache-2.0
"""Adapters replaced in a compiled model, and how it is prepared so that it is not compiled again."""

import copy
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch._dynamo.testing import CompileCounter

from peft_spp import SPPConfig, hotswap_adapter, prepare_model_for_compiled_hotswap

from helpers.tiny import MLP, randomize
from helpers.unchanged import refused


def load(folder, base):
    return PeftModel.from_pretrained(base, folder).eval()


# name: configuration; 20 and 6 output rows, so that lin1 has six blocks where more are asked for
COMPILED = {
    "few": {"r": 2, "spp_alpha": 3},
    "more": {"r": 5, "spp_alpha": 7, "alpha_pattern": {"lin1": 4}, "rank_pattern": {"lin1": 3}},
    "one layer": {"r": 10, "target_modules": ["lin0"]},
}


def save_mlp(folder, base, **settings):
    config = SPPConfig(**{"target_modules": ["lin0", "lin1"], **settings})
    model = get_peft_model(copy.deepcopy(base), config).eval()
    randomize(model)
    model.save_pretrained(folder)
    return model


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_compiled_model_is_not_compiled_again(tmp_path, compiler):
    torch.manual_seed(0)
    base, x = MLP(), torch.randn(2, 12)
    alphas = {"first": 8, "second": 8, "scaled": 5}
    outputs = {name: save_mlp(tmp_path / name, base, r=3, spp_alpha=alpha)(x) for name, alpha in alphas.items()}
    counter = CompileCounter()
    model = torch.compile(load(tmp_path / "first", base), backend=counter)
    torch.testing.assert_close(model(x), outputs["first"])
    compiled = counter.frame_count
    assert compiled > 0
    hotswap_adapter(model, tmp_path / "second", "default")
    torch.testing.assert_close(model(x), outputs["second"])
    assert counter.frame_count == compiled
    # another scaling is a constant of the compiled code: it is compiled anew, and right
    hotswap_adapter(model, tmp_path / "scaled", "default")
    torch.testing.assert_close(model(x), outputs["scaled"])


@pytest.mark.filterwarnings("ignore:The new adapter does not cover")
@pytest.mark.parametrize("grad", [False, True])
def test_a_prepared_model_is_not_compiled_again_for_other_ranks_and_scalings(tmp_path, compiler, grad):
    torch.manual_seed(0)
    base, x = MLP(), torch.randn(3, 12)
    with torch.set_grad_enabled(grad):
        outputs = {name: save_mlp(tmp_path / name, base, **settings)(x) for name, settings in COMPILED.items()}
        model = load(tmp_path / "few", copy.deepcopy(base))
        prepare_model_for_compiled_hotswap(model, target_rank=10)
        assert torch.equal(model(x), outputs["few"])
        counter = CompileCounter()
        model = torch.compile(model, backend=counter, fullgraph=True)
        torch.testing.assert_close(model(x), outputs["few"])
        assert counter.frame_count == 1
        with torch._dynamo.config.patch(error_on_recompile=True):
            for name in ("more", "one layer", "few", "more"):
                hotswap_adapter(model, tmp_path / name, "default")
                torch.testing.assert_close(model(x), outputs[name])
                model.save_pretrained(tmp_path / "again")
                torch.testing.assert_close(load(tmp_path / "again", copy.deepcopy(base))(x), outputs[name])
        assert counter.frame_count == 1


def test_without_preparation_another_scaling_is_compiled_again(tmp_path, compiler):
    base, x = MLP(), torch.randn(3, 12)
    for name, alpha in (("first", 3), ("second", 4)):
        save_mlp(tmp_path / name, base, r=2, spp_alpha=alpha)
    model = torch.compile(load(tmp_path / "first", base), backend="eager")
    model(x)
    hotswap_adapter(model, tmp_path / "second", "default")
    with (
        torch._dynamo.config.patch(error_on_recompile=True),
        pytest.raises(torch._dynamo.exc.RecompileError),
    ):
        model(x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target_rank", [None, 15, 100])
def test_preparing_changes_no_bit_of_outputs_and_merged_weights(dtype, target_rank):
    torch.manual_seed(0)
    settings = {"r": 5, "spp_alpha": 7, "target_modules": ["lin0", "lin1"], "rank_pattern": {"lin1": 3}}
    model = get_peft_model(MLP(), SPPConfig(**settings))
    model.add_adapter("second", SPPConfig(r=1, spp_alpha=3, target_modules=["lin0"]))
    randomize(model)
    model = model.to(dtype).eval()
    x = torch.randn(3, 12, dtype=dtype)
    model.base_model.set_adapter(["default", "second"])
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    outputs, merged = model(x), copy.deepcopy(model).merge_and_unload()
    prepare_model_for_compiled_hotswap(model, target_rank=target_rank, config=model.peft_config)
    assert torch.equal(model(x), outputs)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable
    for layer in (model.base_model.model.lin0, model.base_model.model.lin1):
        for adapter in layer.spp_A:
            assert isinstance(layer.scaling[adapter], torch.Tensor)
            assert layer.r[adapter] == layer.spp_A[adapter].weight.shape[0]
            if target_rank is not None:
                assert layer.r[adapter] == min(target_rank, layer.out_features)
    for (name, ours), theirs in zip(model.merge_and_unload().named_parameters(), merged.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_prepared_adapter_trains_and_its_scaling_is_read_as_a_number_would_be():
    def gradients(prepare):
        torch.manual_seed(0)
        model = get_peft_model(MLP().double(), SPPConfig(r=5, target_modules=["lin0"])).double()
        randomize(model)
        if prepare:
            prepare_model_for_compiled_hotswap(model)
        layer = model.base_model.model.lin0
        layer.set_scale("default", 0.5)
        layer.scale_layer(3.0)
        layer.unscale_layer(2.0)
        assert float(layer.scaling["default"]) == pytest.approx(0.75 * 32 / 5)
        model(torch.linspace(-1, 1, 36, dtype=torch.float64).view(3, 12)).square().sum().backward()
        return [layer.spp_A["default"].weight.grad, layer.spp_B["default"].weight.grad]

    torch.testing.assert_close(gradients(True), gradients(False))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_rank": 4}, r"larger \(5\)"),
        ({"target_rank": 8}, "lin0.*5 blocks of 20 rows"),
        ({"target_rank": 0}, "target_rank"),
        ({"config": SPPConfig(r=5), "target_rank": 10}, "peft_config"),
        ({"check_compiled": "perhaps"}, "check_compiled"),
    ],
)
def test_what_cannot_be_prepared_is_named_and_left_alone(arguments, message):
    model = get_peft_model(MLP(), SPPConfig(r=5, target_modules=["lin1", "lin0"]))
    with refused(model, message):
        prepare_model_for_compiled_hotswap(model, **arguments)
    assert isinstance(model.base_model.model.lin0.scaling["default"], float)


def test_a_model_that_is_compiled_already_or_has_no_adapter_is_not_prepared():
    with pytest.raises(ValueError, match="SPP layers"):
        prepare_model_for_compiled_hotswap(MLP())
    model = torch.compile(get_peft_model(MLP(), SPPConfig(r=5, target_modules=["lin0"])))
    with pytest.raises(ValueError, match="before"):
        prepare_model_for_compiled_hotswap(model)
    with pytest.warns(UserWarning, match="before"):
        prepare_model_for_compiled_hotswap(model, check_compiled="warn")
    in_place = get_peft_model(MLP(), SPPConfig(r=5, target_modules=["lin0"]))
    in_place.compile()
    with pytest.raises(ValueError, match="before"):
        prepare_model_for_compiled_hotswap(in_place)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare_model_for_compiled_hotswap(in_place, check_compiled="ignore")
    assert isinstance(in_place.base_model.model.lin0.scaling["default"], torch.Tensor)
