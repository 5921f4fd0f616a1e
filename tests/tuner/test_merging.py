# SPDX-License-Identifier: Apache-2.0
import copy
import itertools

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from peft_spp import SPPConfig
from peft_spp.checkpoints.merged import MERGED
from peft_spp.sparsity import compare_sparsity, sparsity_report

from helpers.tiny import MLP, block_linears, is_positive_zero, prune_, randomize, tiny_llama


PATTERNS = ["0.5", "0.75", "0.9", "2:4", "4:8", "2:8"]


def pruned_llama(pattern: str, dtype=torch.float32, seed=0):
    model = tiny_llama(seed)
    for layer in block_linears(model).values():
        prune_(layer.weight, pattern)
    return model.to(dtype)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: layer.weight.detach().clone() for name, layer in block_linears(model).items()}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    as_int = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(as_int), b.contiguous().view(as_int))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pruned_place_is_plus_zero_after_training_merging_and_saving(pattern, dtype, tmp_path):
    base = pruned_llama(pattern, dtype)
    pruned = {name: w == 0 for name, w in weights(base).items()}
    torch.manual_seed(1)
    model = get_peft_model(base, SPPConfig(task_type="CAUSAL_LM", r=5)).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1.0)
    for _ in range(5):
        ids = torch.randint(0, 64, (2, 12))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, w in weights(model).items():
        assert is_positive_zero(w[pruned[name]]).all()
    changed = model.merge_and_unload()
    changed.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    for name, mask in pruned.items():
        assert is_positive_zero(saved[f"{name}.weight"][mask]).all()
    assert any((saved[f"{name}.weight"] != w).any() for name, w in weights(pruned_llama(pattern, dtype)).items())
    comparison = compare_sparsity(pruned_llama(pattern, dtype), tmp_path)
    assert comparison.lost == 0 and comparison.kept and comparison.negative_zeros == 0
    if ":" in pattern:
        assert sparsity_report(tmp_path, patterns=(pattern,)).all_satisfy(pattern)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_a_broken_adapter_never_reaches_a_pruned_place(broken):
    base = pruned_llama("2:4")
    pruned = {name: w == 0 for name, w in weights(base).items()}
    model = get_peft_model(base, SPPConfig(r=4))
    randomize(model)
    for name, p in model.named_parameters():
        if ".spp_" in name:
            p.data.view(-1)[0] = broken
    for name, w in weights(model.merge_and_unload()).items():
        assert is_positive_zero(w[pruned[name]]).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_unmerge_restores_every_bit(dtype):
    base = pruned_llama("0.5", dtype)
    with torch.no_grad():
        next(iter(block_linears(base).values())).weight[0, 0] = -0.0
    before = weights(base)
    model = get_peft_model(base, SPPConfig(r=5, init_weights=False))
    model.add_adapter("b", SPPConfig(r=3, init_weights=False))
    model.add_adapter("c", SPPConfig(r=5, init_weights=False, target_modules=["q_proj", "up_proj"]))
    for names in (["default"], ["b", "c"], ["c", "default", "b"]):
        model.merge_adapter(names)
        assert any(not torch.equal(before[name], w) for name, w in weights(model).items())
        model.unmerge_adapter()
        assert all(same_bits(before[name], w) for name, w in weights(model).items())
    for name in ("b", "default", "c"):
        model.merge_adapter([name])
    model.unmerge_adapter()
    assert all(same_bits(before[name], w) for name, w in weights(model).items())
    with model.disable_adapter():
        pass
    model.merge_adapter(["b"])
    with model.disable_adapter():
        model(input_ids=torch.arange(4).view(1, 4))  # unmerges, as LoRA does
    assert all(same_bits(before[name], w) for name, w in weights(model).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_sequence_of_merges_equals_the_batch_merge(dtype):
    model = get_peft_model(pruned_llama("0.5", dtype), SPPConfig(r=5, init_weights=False))
    model.add_adapter("b", SPPConfig(r=3, init_weights=False))
    model.add_adapter("c", SPPConfig(r=7, init_weights=False))
    names = ["default", "b", "c"]
    model.merge_adapter(names)
    batch = weights(model)
    model.unmerge_adapter()
    for order in itertools.permutations(names):
        for name in order:
            model.merge_adapter([name])
        assert all(same_bits(batch[key], w) for key, w in weights(model).items())
        model.unmerge_adapter()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_and_unmerged_logits_agree(dtype):
    model = get_peft_model(pruned_llama("2:4", dtype), SPPConfig(r=4)).eval()
    randomize(model)
    ids = torch.randint(0, 64, (2, 10))
    unmerged = model(input_ids=ids).logits
    # forward multiplies with the very weight that merging writes
    assert torch.equal(model.merge_and_unload()(input_ids=ids).logits, unmerged)


@pytest.mark.parametrize("order", list(itertools.permutations(["default", "b", "c"])))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_and_unmerged_logits_of_several_adapters_agree_in_any_order(order, dtype):
    model = get_peft_model(pruned_llama("2:4", dtype), SPPConfig(r=4, init_weights=False)).eval()
    model.add_adapter("b", SPPConfig(r=3, init_weights=False))
    model.add_adapter("c", SPPConfig(r=7, init_weights=False, target_modules=["q_proj", "up_proj"]))
    model.base_model.set_adapter(list(order))
    ids = torch.randint(0, 64, (2, 10))
    unmerged = model(input_ids=ids).logits
    model.merge_adapter(list(order)[::-1])
    assert torch.equal(model(input_ids=ids).logits, unmerged)


def test_merge_and_unload_keeps_no_backup():
    model = get_peft_model(pruned_llama("2:4"), SPPConfig(r=4, init_weights=False))
    layers = [m for m in model.modules() if hasattr(m, "_unmerged_weight")]
    model.merge_and_unload()
    assert layers and all(layer._unmerged_weight is None for layer in layers)
    model = get_peft_model(pruned_llama("2:4"), SPPConfig(r=4, init_weights=False))
    model.merge_adapter()
    merged = weights(model)
    unloaded = model.merge_and_unload()
    assert all(same_bits(merged[name], w) for name, w in weights(unloaded).items())


def test_merge_and_unload_of_chosen_adapters():
    model = get_peft_model(pruned_llama("2:4"), SPPConfig(r=4, init_weights=False))
    model.add_adapter("b", SPPConfig(r=3, init_weights=False))
    reference = copy.deepcopy(model)
    reference.merge_adapter(["b"])
    expected = weights(reference)
    assert all(
        same_bits(expected[name], w) for name, w in weights(model.merge_and_unload(adapter_names=["b"])).items()
    )


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
def test_safe_merge_raises_before_anything_changes(how):
    base = pruned_llama("2:4")
    before = weights(base)
    model = get_peft_model(base, SPPConfig(r=4, init_weights=False))
    model.base_model.model.model.layers[2].mlp.down_proj.spp_B["default"].weight.data[3] = float("nan")
    with pytest.raises(ValueError, match=r"(?s)adapter default seems to be broken.*layers\.2\.mlp\.down_proj"):
        getattr(model, how)(safe_merge=True)
    assert all(same_bits(before[name], w) for name, w in weights(model).items())
    assert model.get_model_status().merged_adapters == []


def test_merging_twice_warns_and_changes_nothing():
    model = get_peft_model(pruned_llama("2:4"), SPPConfig(r=4, init_weights=False))
    model.merge_adapter()
    once = weights(model)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    assert all(same_bits(once[name], w) for name, w in weights(model).items())
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


def test_a_merged_adapter_cannot_be_deleted():
    model = get_peft_model(MLP(), SPPConfig(r=3, target_modules=["lin0"], init_weights=False))
    model.add_adapter("b", SPPConfig(r=3, target_modules=["lin0"], init_weights=False))
    model.merge_adapter(["b"])
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("b")
    model.unmerge_adapter()
    model.delete_adapter("b")


def test_tied_weights_are_merged_each_with_its_own_adapter():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb = nn.Embedding(12, 8)
            self.a = nn.Linear(8, 12, bias=False)
            self.b = nn.Linear(8, 12, bias=False)
            self.a.weight = self.emb.weight
            self.b.weight = self.emb.weight

        def forward(self, ids):
            x = self.emb(ids)
            return self.a(x) + 3 * self.b(x)

    torch.manual_seed(0)
    model = get_peft_model(Tied(), SPPConfig(r=4, target_modules=["a", "b"], init_weights=False)).eval()
    ids = torch.arange(12)
    before, unmerged = model.base_model.model.emb.weight.clone(), model(ids)
    with pytest.warns(UserWarning, match="shared"):
        model.merge_adapter()
    torch.testing.assert_close(model(ids), unmerged)
    assert same_bits(model.base_model.model.emb.weight, before)
    model.unmerge_adapter()
    for layer in (model.base_model.model.a, model.base_model.model.b):
        assert same_bits(layer.get_base_layer().weight, before)


def test_a_tied_layer_that_is_merged_in_inference_mode_can_be_trained_again():
    model = get_peft_model(tiny_llama(tie_word_embeddings=True), SPPConfig(r=4, target_modules=["q_proj", "lm_head"]))
    ids = torch.tensor([[1, 5, 9]])
    with torch.inference_mode(), pytest.warns(UserWarning, match="shared"):
        model.merge_adapter()
    model.unmerge_adapter()
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.base_model.model.lm_head.spp_B["default"].weight.grad is not None


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_a_misspelled_adapter_is_not_left_out_of_a_merge(merge):
    model = get_peft_model(pruned_llama("0.5"), SPPConfig(r=4, init_weights=False))
    with pytest.raises(ValueError, match=r"Adapter 'defualt' not found, available adapters: \['default'\]"):
        getattr(model, merge)(adapter_names=["defualt"])
    assert model.get_model_status().merged_adapters == [] and model.get_model_status().enabled


def test_spp_around_a_layer_of_another_method_is_neither_merged_nor_unloaded():
    base = MLP()
    prune_(base.lin0.weight, "0.5")
    lora = get_peft_model(base, LoraConfig(target_modules=["lin0"], r=2, init_lora_weights=False))
    model = get_peft_model(lora.base_model.model, SPPConfig(target_modules=["lin0"], r=4, init_weights=False))
    before = copy.deepcopy(model.state_dict())
    for change in (model.merge_adapter, model.merge_and_unload, model.unload):
        with pytest.raises(ValueError, match=r"module 'lin0' has another adapter .*, a layer of peft\.tuners\.lora"):
            change()
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_delta_weight_is_what_merging_adds():
    model = get_peft_model(MLP().double(), SPPConfig(r=3, target_modules=["lin0"], init_weights=False))
    layer = model.base_model.model.lin0
    before, delta = layer.get_base_layer().weight.detach().clone(), layer.get_delta_weight("default")
    layer.merge()
    torch.testing.assert_close(layer.get_base_layer().weight.detach(), before + delta)
    # computed from the weight without the merged adapter
    torch.testing.assert_close(layer.get_delta_weight("default"), delta)


def test_lora_conversion_is_refused():
    model = get_peft_model(MLP(), SPPConfig(r=3, target_modules=["lin0"]))
    assert not model.supports_lora_conversion()


def test_merge_and_unload_peaks_at_one_layer():
    torch.manual_seed(0)
    base = nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(6)])
    model = get_peft_model(base, SPPConfig(target_modules=[str(i) for i in range(6)], init_weights=False))
    layer_bytes = 1024 * 1024 * 4
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        model.merge_and_unload()
    alive = peak = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    # one merged layer, next to tiles and the mask of a few rows
    assert layer_bytes <= peak < 2.2 * layer_bytes


def test_saved_adapter_gives_the_same_logits_on_another_device_map_and_dtype(tmp_path):
    model = get_peft_model(pruned_llama("2:4"), SPPConfig(r=4, task_type="CAUSAL_LM")).eval()
    randomize(model)
    ids = torch.randint(0, 64, (2, 10))
    expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(pruned_llama("2:4"), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert torch.equal(loaded(input_ids=ids).logits, expected)
    half = PeftModel.from_pretrained(pruned_llama("2:4", torch.bfloat16), tmp_path).eval()
    torch.testing.assert_close(half(input_ids=ids).logits.float(), expected, atol=0.1, rtol=0.1)


def test_a_model_lists_the_adapters_that_its_weights_contain_however_they_were_merged():
    def two():
        model = get_peft_model(tiny_llama(), SPPConfig(r=4, task_type="CAUSAL_LM"), adapter_name="aa")
        model.add_adapter("bb", SPPConfig(r=2, task_type="CAUSAL_LM"))
        torch.manual_seed(0)
        randomize(model)
        return model

    def listed(model):
        return getattr(model.config, MERGED, [])

    (aa,), (bb,) = (listed(two().merge_and_unload(adapter_names=[name])) for name in ("aa", "bb"))
    assert aa != bb
    assert listed(two().merge_and_unload(adapter_names=[])) == listed(two().unload()) == []
    for step, last, expected in (
        (["aa"], ["bb"], [aa, bb]),
        (["aa"], ["aa"], [aa]),
        (["aa", "bb"], [], [aa, bb]),
        (["bb"], None, [bb]),
    ):
        model = two()
        model.merge_adapter(step)
        assert listed(model.unload() if last is None else model.merge_and_unload(adapter_names=last)) == expected
    # unmerged again, it is not in the weights
    model = two()
    model.merge_adapter(["aa"])
    model.unmerge_adapter()
    assert listed(model.unload()) == []


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("name", ["merge_adapter", "merge_and_unload"])
def test_what_has_no_values_is_not_merged_and_named(name, safe_merge):
    config = SPPConfig(r=2, target_modules=["lin0", "lin1"])
    with torch.device("meta"):
        model = get_peft_model(MLP(), config)
    with pytest.raises(ValueError, match=r"'lin0'.*meta device, without values\. Load"):
        getattr(model, name)(safe_merge=safe_merge)
    model = get_peft_model(MLP(), config, low_cpu_mem_usage=True)
    before = {name: tensor.clone() for name, tensor in model.base_model.model.state_dict().items() if "base" in name}
    message = r"Adapter 'default' has no values in module 'lin0'.*`low_cpu_mem_usage=True`.*Load them"
    with pytest.raises(ValueError, match=message):
        getattr(model, name)(safe_merge=safe_merge)
    after = model.base_model.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    # PyTorch computes with what is in memory by chance
    with pytest.raises(ValueError, match=message):
        model(torch.randn(2, 12))
    with model.disable_adapter():
        model(torch.randn(2, 12))


def test_an_adapter_that_was_added_to_offloaded_layers_is_refused_with_the_reason():
    model = get_peft_model(cpu_offload(MLP(), torch.device("cpu")), SPPConfig(r=2, target_modules=["lin0"]))
    with pytest.raises(ValueError, match=r"no values in module 'lin0'.*to a layer that was offloaded"):
        model(torch.randn(2, 12))
