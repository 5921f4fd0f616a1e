# SPDX-License-Identifier: Apache-2.0
"""What a refusal advises works, and nothing is pruned by what was not measured."""

import copy
import re
import warnings
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import nn

from peft_spp.pruning import prune_checkpoint, prune_magnitude, prune_sparsegpt, prune_wanda, pruning_mask
from peft_spp.pruning.layers import find_target_layers
from peft_spp.sparsity import sparsity_report

from helpers.every_model import build
from helpers.tiny import tiny_llama


DATA = [torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
BY_DATA = [prune_wanda, prune_sparsegpt]


def refused(prune, model: nn.Module, message: str, **arguments) -> None:
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        prune(model, DATA, **arguments)
    pairs = zip(model.state_dict().values(), before.values(), strict=True)
    assert all(torch.equal(one.nan_to_num(), other.nan_to_num()) for one, other in pairs)


@pytest.mark.parametrize("prune", BY_DATA)
@pytest.mark.parametrize(
    "advised", [{"pattern": "2:4", "exclude_modules": ["down_proj"]}, {"pattern": "1:2"}, {"sparsity": 0.5}]
)
def test_inputs_that_m_does_not_divide(prune, advised: dict) -> None:
    model = tiny_llama(intermediate_size=46)
    refused(prune, model, r"46 input features of .*down_proj are not divisible by the M of 2:4", pattern="2:4")
    prune(model, DATA, **advised, **({"block_size": 16} if prune is prune_sparsegpt else {}))


class NeverChosen(nn.Module):
    """A mixture of which one expert gets no token."""

    def __init__(self) -> None:
        super().__init__()
        self.chosen, self.other = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, 32)
        return torch.cat([self.chosen(tokens), self.other(tokens[:0])]).reshape(x.shape)


class NeverCalled(NeverChosen):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.chosen(x)


class AllZero(NeverChosen):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.chosen(x) + self.other(torch.zeros_like(x))


@pytest.mark.parametrize("prune", BY_DATA)
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (NeverChosen, r"No calibration data reached model\.layers\.1\.mlp\.other, .*exclude_modules"),
        (NeverCalled, r"No calibration data reached model\.layers\.1\.mlp\.other, .*exclude_modules"),
        (AllZero, r"inputs of model\.layers\.1\.mlp\.other are all zero, .*exclude_modules"),
    ],
)
def test_a_layer_without_data_is_refused_and_can_be_excluded(prune, kind: type, message: str) -> None:
    model = tiny_llama()
    model.model.layers[1].mlp = kind()
    refused(prune, model, message, pattern="2:4")
    prune(model, DATA, pattern="2:4", exclude_modules=["mlp.other"])
    assert (model.model.layers[1].mlp.other.weight != 0).all()
    assert (model.model.layers[1].mlp.chosen.weight == 0).float().mean() == 0.5


@pytest.mark.parametrize("prune", BY_DATA)
def test_activations_that_float16_cannot_hold(prune) -> None:
    def large(dtype: torch.dtype) -> nn.Module:
        model = tiny_llama()
        model.model.layers[1].mlp.up_proj.weight.data.fill_(500.0)
        model.model.layers[1].mlp.gate_proj.weight.data.fill_(500.0)
        model.model.layers[1].post_attention_layernorm.weight.data.fill_(10.0)
        return model.to(dtype)

    model = large(torch.float16)
    refused(prune, model, r"mlp.down_proj are not finite.*bfloat16.*exclude_modules", pattern="2:4")
    prune(large(torch.bfloat16), DATA, pattern="2:4")


def test_a_sequence_that_is_too_long_is_told_by_its_length_and_not_by_the_dtype() -> None:
    model = build("gpt2")
    told = r"float32, cannot be called .*: index out of .*\. The batch \(input_ids \(2, 65\)\) .*sequence_length"
    with pytest.raises(ValueError, match=told) as refusal:
        prune_wanda(model, [torch.full((2, 65), 5)], pattern="2:4")
    assert "float32 only" not in str(refusal.value)
    prune_wanda(model, [torch.full((2, 64), 5)], pattern="2:4")


@pytest.mark.parametrize("kind", ["disk", "cpu", "device_map", "experts"])
def test_an_offloaded_model_is_refused_and_its_folder_can_be_pruned(tmp_path: Path, kind: str) -> None:
    model, first = tiny_llama(), "model.layers.0.self_attn.q_proj"
    if kind == "experts":
        model, first = build("qwen2_moe"), "model.layers.0.mlp.experts.gate_up_proj.0"
    model.save_pretrained(tmp_path / "dense")
    if kind == "device_map":
        in_memory = ("embed_tokens", "rotary_emb", "layers.1", "layers.2", "norm")
        places = {"model.layers.0": "disk", "lm_head": "cpu"} | {f"model.{name}": "cpu" for name in in_memory}
        model = type(model).from_pretrained(tmp_path / "dense", device_map=places, offload_folder=tmp_path / "off")
    elif kind == "cpu":
        cpu_offload(model, torch.device("cpu"))
    else:
        disk_offload(model, tmp_path / "off", torch.device("cpu"))
    before = model(DATA[0]).logits
    request = {"pattern": "2:4", "target_modules": [first.removesuffix(".0")]}
    message = rf"{re.escape(first)} has no data in memory .*`peft-spp prune`"
    with pytest.raises(ValueError, match=message):
        prune_wanda(model, DATA, **request)
    with pytest.raises(ValueError, match=message):
        prune_magnitude(model, **request)
    assert torch.equal(model(DATA[0]).logits, before)
    report = prune_checkpoint(tmp_path / "dense", tmp_path / "out", calibration=DATA, **request)
    assert report.sparsity == 0.5


def test_what_is_not_pruned_may_be_offloaded() -> None:
    models = [tiny_llama(), tiny_llama()]
    cpu_offload(models[1].model.embed_tokens, torch.device("cpu"))
    for model in models:
        prune_wanda(model, DATA, pattern="2:4")
    for name, layer in find_target_layers(models[0], None).items():
        assert torch.equal(layer.weight, models[1].get_submodule(name).weight), name


def test_a_dead_input_is_pruned_first() -> None:
    model = tiny_llama()
    model.model.layers[0].input_layernorm.weight.data[5] = 0.0
    prune_wanda(model, DATA, pattern="2:4")
    assert (model.model.layers[0].self_attn.q_proj.weight[:, 5] == 0).all()


def test_a_layer_of_another_map_is_refused_where_it_is_named_and_left_dense_by_default() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).repeat(1, 2)[..., : self.out_features] * 2 + x.abs().sum()

    model = tiny_llama()
    model.model.layers[1].mlp.up_proj = Doubled(32, 48)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj, a Doubled, is not a linear map"):
        prune_magnitude(model, pattern="2:4", target_modules=["up_proj"])
    prune_magnitude(model, pattern="2:4", target_modules=["up_proj"], exclude_modules=["1.mlp.up_proj"])
    with pytest.warns(UserWarning, match=r"1 layers stay dense. model\.layers\.1\.mlp\.up_proj"):
        prune_magnitude(model, pattern="2:4")
    assert (model.model.layers[1].mlp.up_proj.weight != 0).all()


@pytest.mark.parametrize("sparsity", [0.97, 0.98, 0.99, 0.999999])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "magnitude"])
def test_no_output_loses_all_of_its_weights_to_rounding(method: str, sparsity: float) -> None:
    model = tiny_llama()
    if method == "magnitude":
        prune_magnitude(model, sparsity=sparsity)
    else:
        dict(wanda=prune_wanda, sparsegpt=prune_sparsegpt)[method](model, DATA, sparsity=sparsity)
    for name, layer in find_target_layers(model, None).items():
        kept = layer.weight != 0
        assert kept.any(), name
        if method == "wanda":
            assert (kept.sum(dim=1) == max(1, layer.in_features - round(sparsity * layer.in_features))).all(), name


# tiny Llama compares 32 or 48 weights of an output, and at least 1024 of a block of inputs or a layer
@pytest.mark.parametrize(
    ("prune", "sparsity", "size", "advised"),
    [
        (prune_wanda, 0.01, 32, "0.031"),
        (prune_sparsegpt, 0.0001, 1024, "0.00098"),
        (lambda model, data, **options: prune_magnitude(model, **options), 0.0001, 1024, "0.00098"),
    ],
)
def test_a_sparsity_that_rounds_to_nothing_is_refused_and_what_it_advises_works(
    prune, sparsity: float, size: int, advised: str
) -> None:
    model = tiny_llama()
    refused(prune, model, f"of the {size} weights .* rounds to 0 in .* is sparsity={advised}", sparsity=sparsity)
    prune(model, DATA, sparsity=float(advised))
    assert (model.model.layers[0].self_attn.q_proj.weight == 0).any()
    prune(tiny_llama(), DATA, sparsity=0.0)


def test_layers_that_a_sparsity_leaves_dense_are_counted() -> None:
    model = tiny_llama()
    # 0.0125 * 48 rounds to 1, and 0.0125 * 32 to 0
    with pytest.warns(
        UserWarning, match=r"of the 32 weights .* rounds to 0 in .*\.q_proj, so 18 of 21 layers stay dense"
    ):
        prune_wanda(model, DATA, sparsity=0.0125)
    dense = {name for name, layer in find_target_layers(model, None).items() if (layer.weight != 0).all()}
    assert len(dense) == 18 and not any("down_proj" in name for name in dense)


@pytest.mark.parametrize(("size", "sparsity", "pruned"), [(32, 0.99, 31), (32, 0.01, 0), (2, 0.9, 1), (1, 0.9, 0)])
def test_how_a_sparsity_is_rounded(size: int, sparsity: float, pruned: int) -> None:
    assert int((~pruning_mask(torch.rand(3, size), sparsity=sparsity)).sum()) == 3 * pruned


def test_a_model_in_two_dtypes_can_be_saved_in_one(tmp_path: Path) -> None:
    model = tiny_llama().to(torch.bfloat16)
    model.model.layers[1].mlp.float()
    model.save_pretrained(tmp_path / "mixed")
    request = {"method": "magnitude", "pattern": "2:4"}
    with pytest.raises(ValueError, match=r"mlp.\w+_proj.weight'.*save the model in one dtype first"):
        prune_checkpoint(tmp_path / "mixed", tmp_path / "out", **request)
    type(model).from_pretrained(tmp_path / "mixed", dtype=torch.bfloat16).save_pretrained(tmp_path / "one")
    assert prune_checkpoint(tmp_path / "one", tmp_path / "out", **request).sparsity == 0.5


def test_what_only_magnitude_can_prune() -> None:
    for kind in ("albert", "t5"):
        model = build(kind)
        refused(prune_wanda, model, "Only magnitude pruning works for this model", pattern="2:4")
        prune_magnitude(model, pattern="2:4")
        assert {one.sparsity for one in sparsity_report(model) if one.zeros} == {0.5}


def test_a_layer_outside_of_the_blocks_can_be_pruned_by_magnitude() -> None:
    model = tiny_llama()
    refused(
        prune_wanda,
        model,
        "lm_head is outside the transformer blocks .* prune it by magnitude",
        pattern="2:4",
        target_modules=["lm_head"],
    )
    prune_magnitude(model, pattern="2:4", target_modules=["lm_head"])
    assert (model.lm_head.weight == 0).float().mean() == 0.5


@pytest.mark.parametrize("targets", [["lm_head"], ".*"])
@pytest.mark.parametrize("prune", [*BY_DATA, lambda model, data, **how: prune_magnitude(model, **how)])
def test_a_head_that_is_tied_to_the_embeddings_is_refused_in_memory_as_from_disk(
    tmp_path: Path, prune, targets: list[str] | str
) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "dense")
    message = "lm_head shares its weight with the embeddings, which pruning would change too. Exclude it"
    refused(prune, model, message, pattern="2:4", target_modules=targets)
    request = {"method": "magnitude", "pattern": "2:4", "target_modules": targets}
    with pytest.raises(ValueError, match=message):
        prune_checkpoint(tmp_path / "dense", tmp_path / "out", **request)
    if targets == ".*":
        prune(model, DATA, pattern="2:4", target_modules=targets, exclude_modules=["lm_head"])
        assert (model.model.embed_tokens.weight != 0).all()
        assert prune_checkpoint(tmp_path / "dense", tmp_path / "out", **request, exclude_modules=["lm_head"])


@pytest.mark.parametrize("names, missing", [(["up_proj", "upproj"], "upproj"), (".*upproj", ".*upproj")])
def test_a_name_that_excludes_nothing_is_told(names: str | list[str], missing: str) -> None:
    told = re.escape(f"exclude_modules: no linear layer of the model matches '{missing}'.")
    with pytest.warns(UserWarning, match=told):
        prune_magnitude(tiny_llama(), pattern="2:4", exclude_modules=names)


def test_a_target_that_is_not_there_is_told_and_targets_come_from_any_iterable() -> None:
    model = tiny_llama()
    with pytest.warns(UserWarning, match="target_modules: no linear layer of the model matches 'k_poj', 'v_poj'"):
        prune_magnitude(model, pattern="2:4", target_modules=(name for name in ("k_poj", "q_proj", "v_poj", "o_proj")))
    for layer in model.model.layers:
        is_pruned = {name: bool((one.weight == 0).any()) for name, one in layer.self_attn.named_children()}
        assert is_pruned == {"q_proj": True, "k_proj": False, "v_proj": False, "o_proj": True}


def test_a_name_of_a_layer_that_is_no_target_is_not_told() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune_magnitude(tiny_llama(), pattern="2:4", exclude_modules=["lm_head"])
