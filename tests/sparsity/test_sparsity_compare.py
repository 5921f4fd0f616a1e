# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from peft_spp.sparsity import compare_sparsity

from helpers.sparsity_tiny_models import keep_n_m, tiny_gpt2, tiny_llama


@pytest.fixture
def before():
    torch.manual_seed(0)
    return {f"layers.{n}.fc.weight": keep_n_m(torch.randn(8, 16).abs() + 1, 2, 4) for n in range(3)}


def copy(state: dict) -> dict:
    return {name: tensor.clone() for name, tensor in state.items()}


def test_the_same_model_keeps_all(before):
    comparison = compare_sparsity(before, copy(before))
    assert comparison.kept and comparison.complete
    assert (comparison.lost, comparison.gained, comparison.zeros_before, len(comparison)) == (0, 0, 192, 3)
    assert comparison.worst() == []


def test_lost_and_new_zeros_are_told_by_module(before):
    after = copy(before)
    changed = after["layers.1.fc.weight"]
    zero, nonzero = (before["layers.1.fc.weight"] == 0).nonzero(), before["layers.1.fc.weight"].nonzero()
    changed[tuple(zero[:5].T)] = 1e-30
    changed[tuple(nonzero[:7].T)] = 0.0
    after["layers.2.fc.weight"][0, (before["layers.2.fc.weight"][0] == 0).nonzero()[0]] = float("nan")
    comparison = compare_sparsity(before, after)
    module = comparison["layers.1.fc"]
    assert (module.lost, module.gained, module.zeros_before, module.zeros_after) == (5, 7, 64, 66)
    assert (comparison.lost, comparison.gained, comparison.non_finite) == (6, 7, 1)
    assert not comparison.kept and comparison.complete
    assert [one.name for one in comparison.worst()] == ["layers.1.fc", "layers.2.fc"]
    assert comparison.worst(1) == [module]
    text = str(comparison)
    assert text.index("layers.1.fc") < text.index("layers.2.fc") and "layers.0.fc" not in text


def test_a_negative_zero_is_kept_and_counted(before):
    after = copy(before)
    weight = after["layers.0.fc.weight"]
    weight[weight == 0] = -0.0
    comparison = compare_sparsity(before, after)
    assert comparison.kept
    assert comparison.negative_zeros == comparison["layers.0.fc"].negative_zeros == 64
    assert compare_sparsity(after, before).lost == 0


def test_dtype_and_kind_of_source_may_differ(before, tmp_path):
    save_file({name: tensor.bfloat16() for name, tensor in before.items()}, tmp_path / "model.safetensors")
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(16, 8)}) for _ in range(3))})
    model.load_state_dict(before, strict=False)
    for after in (tmp_path, model):
        assert compare_sparsity(before, after).kept
        assert compare_sparsity(after, before).kept


def test_missing_modules_are_not_kept(before):
    after = copy(before)
    after["new.weight"] = after.pop("layers.0.fc.weight")
    comparison = compare_sparsity(before, after)
    assert comparison.missing_after == ("layers.0.fc",)
    assert comparison.missing_before == ("new",)
    assert comparison.lost == 0 and not comparison.kept and not comparison.complete
    assert "layers.0.fc" in str(comparison) and "new" in str(comparison)
    assert not compare_sparsity(before, {}).kept
    assert not compare_sparsity({}, {}).kept
    assert str(compare_sparsity({}, {}))


def test_a_module_of_another_shape_is_not_compared(before):
    after = copy(before)
    after["layers.0.fc.weight"] = torch.zeros(16, 8)
    comparison = compare_sparsity(before, after)
    assert comparison.reshaped == {"layers.0.fc": ((8, 16), (16, 8))}
    assert len(comparison) == 2 and not comparison.kept


def test_a_quantized_module_is_unknown_and_not_kept(before):
    after = copy(before)
    after["layers.0.fc.weight"] = after["layers.0.fc.weight"].to(torch.uint8)
    for one, other in ((before, after), (after, before), (after, after)):
        comparison = compare_sparsity(one, other)
        assert list(comparison.unreadable) == ["layers.0.fc"]
        assert not comparison.kept and comparison.lost == 0


def test_only_some_modules_can_be_compared(before):
    after = copy(before)
    after["layers.0.fc.weight"] += 1
    assert compare_sparsity(before, after, modules=["layers.1.fc", "layers.2.fc"]).kept
    assert not compare_sparsity(before, after, modules=r"layers\.[01]\.fc").kept


def test_a_wrapped_model_is_compared_by_its_base_layers(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = tiny_llama()
    model.save_pretrained(tmp_path)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    assert compare_sparsity(tmp_path, wrapped).kept
    merged = wrapped.merge_and_unload()
    comparison = compare_sparsity(tmp_path, merged)
    assert {module.name for module in comparison.worst()} == {f"model.layers.{n}.self_attn.q_proj" for n in range(2)}


def test_conv1d_needs_no_hint():
    model = tiny_gpt2()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if name.endswith("weight")}
    model.transformer.h[0].mlp.c_fc.weight.data[:, 0] = 1.0
    comparison = compare_sparsity(before, model)
    assert comparison.lost == comparison["transformer.h.0.mlp.c_fc"].lost == 16
    assert comparison.complete


def test_a_layer_named_like_an_embedding_is_compared_where_one_side_knows_better():
    model = nn.ModuleDict({"embed_action": nn.Linear(8, 8)})
    assert compare_sparsity(model, model.state_dict()).complete


def test_experts_are_compared():
    before = {"mlp.experts.down_proj": torch.zeros(2, 4, 4)}
    after = {"mlp.experts.down_proj": torch.zeros(2, 4, 4)}
    after["mlp.experts.down_proj"][1, 2] = 1.0
    assert compare_sparsity(before, after).lost == 4


def test_pieces_do_not_change_the_counts(before, monkeypatch):
    after = copy(before)
    after["layers.1.fc.weight"][3:] = 1.0
    after["layers.0.fc.weight"][::2] = -0.0
    after["layers.0.fc.weight"][1::2] = float("inf")
    expected = compare_sparsity(before, after).to_dict()
    monkeypatch.setattr("peft_spp.sparsity.counting.CHUNK_ELEMENTS", 20)
    assert compare_sparsity(before, after).to_dict() == expected
    assert (expected["lost"], expected["negative_zeros"], expected["non_finite"]) == (40 + 32, 64, 64)


def test_the_comparison_is_data(before):
    after = copy(before)
    after["layers.0.fc.weight"] = torch.zeros(4, 4)
    data = json.loads(json.dumps(compare_sparsity(before, after).to_dict()))
    assert data["kept"] is False
    assert data["reshaped"] == {"layers.0.fc": [[8, 16], [4, 4]]}
    assert [module["name"] for module in data["modules"]] == ["layers.1.fc", "layers.2.fc"]


def test_the_table_names_the_worst_and_counts_the_rest():
    before = {f"layers.{n}.fc.weight": torch.zeros(4, 4) for n in range(30)}
    after = {f"layers.{n}.fc.weight": torch.zeros(4, 4) for n in range(30)}
    for n in range(15):
        after[f"layers.{n}.fc.weight"].view(-1)[: n + 1] = 1.0
    text = str(compare_sparsity(before, after))
    assert "layers.14.fc" in text and "layers.3.fc" not in text
    assert len(text.splitlines()) < 25
