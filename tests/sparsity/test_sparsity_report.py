# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from peft_spp.checkpoints.layout import model_types
from peft_spp.sparsity import NMPattern, SparsityReport, sparsity_report

from helpers.sparsity_tiny_models import keep_n_m, tiny_gpt2, tiny_llama


LLAMA_KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LLAMA_PATTERNS = dict.fromkeys(LLAMA_KINDS, "2:4") | {
    "mlp.gate_proj": "2:8",
    "mlp.up_proj": "unstructured",
    "mlp.down_proj": "dense",
}


@pytest.fixture(scope="module")
def llama():
    return tiny_llama()


@pytest.fixture(scope="module")
def gpt2():
    return tiny_gpt2()


def modules_of(report: SparsityReport) -> dict:
    return dict(report.modules)


def test_patterns_of_a_llama(llama):
    report = sparsity_report(llama)
    found = {module.name: module.pattern for module in report}
    assert found == {
        f"model.layers.{layer}.{kind}": pattern for layer in range(2) for kind, pattern in LLAMA_PATTERNS.items()
    }
    down, up = report["model.layers.0.mlp.down_proj"], report["model.layers.0.mlp.up_proj"]
    assert (down.sparsity, up.sparsity) == (0.0, 0.5)
    assert (up.shape, up.in_features, up.out_features, up.dtype) == ((48, 32), 32, 48, "float32")
    assert report.total_sparsity == pytest.approx(report.zeros / report.numel)
    assert report.numel == sum(weight.numel() for name, weight in llama.named_parameters() if "proj" in name)


@pytest.mark.parametrize("kind", ["state dict", "file", "folder", "shards", "no index", "peft", "compiled"])
def test_every_kind_of_source_gives_the_same_report(llama, tmp_path, kind):
    expected = modules_of(sparsity_report(llama))
    if kind == "state dict":
        source = llama.state_dict()
    elif kind == "peft":
        from peft import LoraConfig, get_peft_model

        source = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj", "gate_proj"]))
    elif kind == "compiled":
        source = torch.compile(llama)
    else:
        llama.save_pretrained(tmp_path, max_shard_size="20KB" if kind in ("shards", "no index") else "1GB")
        source = tmp_path / "model.safetensors" if kind == "file" else tmp_path
        if kind in ("shards", "no index"):
            assert len(list(tmp_path.glob("*.safetensors"))) > 2
        if kind == "no index":
            (tmp_path / "model.safetensors.index.json").unlink()
    report = sparsity_report(source)
    assert modules_of(report) == expected


@pytest.mark.parametrize("kind", ["module", "state dict", "file", "folder", "shards"])
def test_conv1d_is_read_along_its_inputs(gpt2, tmp_path, kind):
    expected = sparsity_report(gpt2)
    if kind == "module":
        report = expected
    elif kind == "state dict":
        report = sparsity_report(gpt2.state_dict())
    else:
        gpt2.save_pretrained(tmp_path, max_shard_size="20KB" if kind == "shards" else "1GB")
        report = sparsity_report(tmp_path / "model.safetensors" if kind == "file" else tmp_path)
    assert modules_of(report) == modules_of(expected)
    assert len(report) == 8
    assert {module.pattern for module in report} == {"2:4"}
    assert report.all_satisfy("2:4")
    attention = report["transformer.h.0.attn.c_attn"]
    assert (attention.shape, attention.in_features, attention.out_features) == ((32, 96), 32, 96)


def test_without_any_hint_the_layout_can_be_given(gpt2):
    bare = {name: tensor for name, tensor in gpt2.state_dict().items() if name.endswith("weight")}
    assert not sparsity_report(bare).all_satisfy("2:4")
    for conv1d in (True, r".*\.c_\w+", ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]):
        assert sparsity_report(bare, conv1d=conv1d).all_satisfy("2:4")


def test_names_of_conv1d_do_not_decide_where_biases_say_otherwise(tmp_path):
    """GPTBigCode calls its nn.Linear layers c_attn and c_proj as well."""
    weight = keep_n_m(torch.randn(24, 16), 2, 4)
    state = {"h.0.attn.c_attn.weight": weight, "h.0.attn.c_attn.bias": torch.zeros(24)}
    assert sparsity_report(state).all_satisfy("2:4")
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_bigcode"}))
    assert sparsity_report(tmp_path).all_satisfy("2:4")
    (tmp_path / "config.json").write_text(json.dumps({"decoder": {"model_type": "gpt2"}}))
    assert not sparsity_report(tmp_path).all_satisfy("2:4")
    assert sparsity_report(tmp_path, conv1d=False).all_satisfy("2:4")


def test_biases_that_contradict_each_other_tell_nothing():
    weight = keep_n_m(torch.randn(24, 16), 2, 4)
    straight = {"a.fc.weight": weight, "a.fc.bias": torch.zeros(24)}
    transposed = {"b.fc.weight": weight, "b.fc.bias": torch.zeros(16)}
    assert sparsity_report(transposed)["b.fc"].transposed
    assert not any(module.transposed for module in sparsity_report(straight | transposed))


def test_the_model_types_of_a_model_and_of_its_parts_are_known():
    parts = {"vision": {"model_type": "vit"}, "text": {"model_type": "llama4_text", "more": {"model_type": "gpt2"}}}
    assert model_types({"model_type": "llama4", **parts}) == {"llama4", "vit", "llama4_text", "gpt2"}
    assert model_types({"model_type": 3, "a": [1]}) == frozenset()


def test_the_model_types_that_use_conv1d_are_those_of_transformers():
    import re
    from pathlib import Path

    import transformers

    from peft_spp.checkpoints.layout import CONV1D_MODEL_TYPES, CONV1D_NAMES, TRANSPOSED_EXPERTS_MODEL_TYPES

    users, names = set(), set()
    for file in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        text = file.read_text(encoding="utf-8")
        types = set()
        for config in file.parent.glob("configuration_*.py"):
            types |= set(re.findall(r'^\s+model_type\s*(?::[^=]+)?= "([\w-]+)"', config.read_text("utf-8"), re.M))
        if "is_transposed=True" in text:
            assert types & TRANSPOSED_EXPERTS_MODEL_TYPES, file
        made = re.findall(r"self\.(\w+) = Conv1D\(", text)
        if made:
            assert types & CONV1D_MODEL_TYPES, file
            users.add(file.parent.name)
            names.update(made)
    assert "gpt2" in users
    assert names <= CONV1D_NAMES


def test_adapters_do_not_count(llama):
    state = {f"base_model.model.{name}": tensor for name, tensor in llama.state_dict().items()}
    query = "base_model.model.model.layers.0.self_attn.q_proj"
    state[f"{query}.base_layer.weight"] = state.pop(f"{query}.weight")
    state[f"{query}.spp_A.default"] = torch.ones(8, 32)
    state[f"{query}.lora_B.default.weight"] = torch.ones(32, 8)
    state[f"{query}.anything_new.default.weight"] = torch.ones(32, 8)
    report = sparsity_report(state)
    assert modules_of(report) == modules_of(sparsity_report(llama))
    assert list(report.skipped.values()).count("adapter") == 3


def test_a_trained_copy_does_not_hide_the_pruned_original():
    state = {
        "base_model.model.fc.original_module.weight": keep_n_m(torch.randn(8, 8), 2, 4),
        "base_model.model.fc.modules_to_save.default.weight": torch.ones(8, 8),
    }
    report = sparsity_report(state)
    assert report.all_satisfy("2:4") and list(report.modules) == ["fc"]
    assert "adapter" in report.skipped.values()


def test_heads_and_embeddings_count_only_when_asked_for(llama):
    report = sparsity_report(llama.state_dict())
    assert report.skipped == {"model.embed_tokens": "embedding", "lm_head": "head"}
    for source in (llama, llama.state_dict()):
        assert list(sparsity_report(source, modules=["lm_head"]).modules) == ["lm_head"]
        chosen = sparsity_report(source, modules=r"model\.layers\.0\..*_proj")
        assert len(chosen) == 7
        assert len(sparsity_report(source, modules=["q_proj", "layers.1.mlp.up_proj"])) == 3


def test_asking_for_a_module_that_is_not_there_is_refused_by_name(llama):
    with pytest.raises(ValueError, match="q_porj"):
        sparsity_report(llama, modules=["q_porj"])


def test_the_tightest_pattern_asked_for_is_reported():
    one_in_four = keep_n_m(torch.randn(8, 16), 1, 4)
    layer = nn.Linear(16, 8)
    layer.weight.data = one_in_four
    assert sparsity_report(layer)[""].pattern == "2:8"
    assert sparsity_report(layer, patterns=("4:8", "2:4"))[""].pattern == "2:4"
    assert sparsity_report(layer, patterns=["4:8", NMPattern(1, 4), "2:8"])[""].pattern == "1:4"
    assert sparsity_report(layer, patterns="4:8")[""].pattern == "4:8"
    assert sparsity_report(layer, patterns=("4:4", "16:16"))[""].pattern == "unstructured"
    report = sparsity_report(layer)
    assert report[""].satisfies("1:4") and report.all_satisfy("1:4") and not report.all_satisfy("1:8")
    with pytest.raises(ValueError, match="1:16"):
        report.all_satisfy("1:16")


def test_a_pattern_is_not_found_where_it_forces_no_zero():
    layer = nn.Linear(2, 50, bias=False)
    layer.weight.data.fill_(1.0)
    layer.weight.data[:10] = 0.0
    assert sparsity_report(layer, patterns="2:4")[""].pattern == "unstructured"
    conv1d = {"fc.weight": layer.weight.T.contiguous()}
    assert sparsity_report(conv1d, patterns="2:4", conv1d=True)["fc"].pattern == "unstructured"
    experts = {"experts.down_proj": torch.stack([layer.weight, layer.weight])}
    assert sparsity_report(experts, patterns="2:4")["experts.down_proj"].pattern == "unstructured"


def test_a_pattern_is_found_in_rows_of_one_group():
    layer = nn.Linear(4, 50, bias=False)
    layer.weight.data = keep_n_m(layer.weight, 2, 4)
    assert sparsity_report(layer)[""].pattern == "2:4"


def test_a_single_zero_in_a_small_weight_is_not_dense():
    weight = torch.ones(4, 4)
    weight[0, 0] = 0.0
    assert sparsity_report({"fc.weight": weight})["fc"].pattern == "unstructured"
    assert sparsity_report({"fc.weight": torch.ones(0, 4)})["fc"].pattern == "dense"


@pytest.mark.parametrize(("zeros", "pattern"), [(0, "dense"), (9, "dense"), (10, "unstructured")])
def test_dense_is_less_than_one_percent_zero(zeros, pattern):
    weight = torch.ones(100, 10)
    weight.view(-1)[torch.arange(zeros) * 100] = 0.0
    assert sparsity_report({"fc.weight": weight})["fc"].pattern == pattern


def test_negative_zeros_and_non_finite_values_are_counted():
    weight = keep_n_m(torch.randn(8, 8), 2, 4)
    weight[weight == 0] = -0.0
    weight[0, 0] = 0.0
    weight[1] = torch.tensor([float("nan"), float("-inf"), 0, 0, 1, 1, 0, 0])
    report = sparsity_report({"fc.weight": weight.bfloat16(), "other.weight": torch.ones(4, 4)})
    module = report["fc"]
    assert module.non_finite == report.non_finite == 2
    assert module.zeros == int((weight == 0).sum())
    assert module.negative_zeros == report.negative_zeros == int(((weight == 0) & weight.signbit()).sum()) > 0
    assert "-0.0" in str(report)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_dtypes(tmp_path, dtype):
    state = {"fc.weight": keep_n_m(torch.randn(8, 16).abs() + 1, 2, 4).to(dtype)}
    save_file(state, tmp_path / "model.safetensors")
    for source in (state, tmp_path):
        module = sparsity_report(source)["fc"]
        assert (module.pattern, module.sparsity, module.dtype) == ("2:4", 0.5, str(dtype).removeprefix("torch."))


def test_what_cannot_be_read_is_named(tmp_path):
    state = {
        "a.weight": torch.ones(4, 4),
        "b.weight": torch.ones(4, 4, dtype=torch.uint8),
        "c.weight": torch.ones(2, 4, 4),
        "c.table": torch.ones(4, 4),
        "n.weight": torch.ones(4),
    }
    save_file(state, tmp_path / "model.safetensors")
    for source in (state, tmp_path):
        report = sparsity_report(source)
        assert list(report.modules) == ["a"]
        assert set(report.skipped) == {"b", "c", "c.table"}
        assert report.skipped["c"] == report.skipped["c.table"] == "not a linear layer's weight"
        assert "b" in str(report)
    sparse = nn.Linear(4, 4)
    sparse.weight = nn.Parameter(torch.eye(4).to_sparse_csr(), requires_grad=False)
    assert len(sparsity_report(sparse)) == 0

    class Packed(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, *args):
            raise NotImplementedError

    assert "Packed" in sparsity_report({"a.weight": torch.ones(4, 4).as_subclass(Packed)}).skipped["a"]


def test_fused_experts_are_read_expert_by_expert():
    out_in = torch.stack([keep_n_m(torch.randn(8, 16), 2, 4) for _ in range(3)])
    state = {"mlp.experts.gate_up_proj": out_in, "mlp.experts.gate_up_proj_scale": torch.ones(3, 8, 1)}
    report = sparsity_report(state)
    module = report["mlp.experts.gate_up_proj"]
    assert len(report) == 1 and list(report.skipped) == ["mlp.experts.gate_up_proj_scale"]
    for name in ("input_linear", "output_linear"):
        assert list(sparsity_report({f"mlp.{name}.weight": out_in}).modules) == [f"mlp.{name}"]
    for name in ("input_linear", "experts", "other"):
        assert not sparsity_report({f"mlp.{name}.scales": out_in, "experts": out_in}).modules
    assert (module.pattern, module.shape, module.in_features, module.out_features) == ("2:4", (3, 8, 16), 16, 8)
    swapped = {"mlp.experts.gate_up_proj": out_in.transpose(1, 2).contiguous()}
    assert sparsity_report(swapped)["mlp.experts.gate_up_proj"].pattern == "unstructured"
    assert sparsity_report(swapped, conv1d=["gate_up_proj"])["mlp.experts.gate_up_proj"].pattern == "2:4"


def test_a_mixture_of_experts_counts_its_experts_and_not_its_router():
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    model = MixtralForCausalLM(config)
    for source in (model, model.state_dict()):
        report = sparsity_report(source)
        assert sum("experts" in name for name in report.modules) >= 2
        assert "router" in report.skipped.values()
        assert sum(name.endswith("_proj") and "self_attn" in name for name in report.modules) == 4
    routers = [name for name, reason in report.skipped.items() if reason == "router"]
    assert list(sparsity_report(model.state_dict(), modules=routers).modules) == routers


def test_masks_of_torch_prune_are_seen():
    from torch.nn.utils import prune

    model = nn.Sequential(nn.Linear(8, 8))
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    assert sparsity_report(model)["0"].sparsity == 0.5


def test_a_meta_weight_is_refused_by_name():
    with torch.device("meta"):
        model = nn.ModuleDict({"fine": nn.Linear(4, 4), "offloaded": nn.Linear(4, 4)})
    model["fine"] = nn.Linear(4, 4)
    for source in (model, model.state_dict()):
        with pytest.raises(ValueError, match="offloaded"):
            sparsity_report(source)


def test_two_weights_of_one_name_are_refused():
    state = {"fc.weight": torch.ones(4, 4), "base_model.model.fc.weight": torch.ones(4, 4)}
    with pytest.raises(ValueError, match=r"base_model\.model\.fc\.weight") as error:
        sparsity_report(state)
    assert "'fc.weight'" in str(error.value)


def test_a_state_dict_of_one_layer_has_a_weight_without_a_name():
    assert list(sparsity_report({"weight": torch.ones(4, 4), "bias": torch.ones(4)}).modules) == [""]


def test_a_mapping_without_tensors_is_refused():
    with pytest.raises(ValueError, match="state_dict"):
        sparsity_report({"state_dict": {"fc.weight": torch.ones(2, 2)}})
    with pytest.raises(TypeError, match="int"):
        sparsity_report(3)


def test_nothing_counted_satisfies_nothing():
    report = sparsity_report({})
    assert (len(report), report.total_sparsity, report.all_satisfy("2:4")) == (0, 0.0, False)
    assert str(report)


def test_the_report_is_data(llama):
    report = sparsity_report(llama)
    data = json.loads(json.dumps(report.to_dict()))
    assert data["total_sparsity"] == report.total_sparsity
    assert [module["name"] for module in data["modules"]] == [module.name for module in report]
    assert data["modules"][0]["pattern"] == "2:4"
    assert "model.layers.0.mlp.up_proj" in report and "lm_head" not in report
    with pytest.raises(KeyError):
        report["lm_head"]


def test_the_table_is_plain_and_names_each_module(llama):
    text = str(sparsity_report(llama))
    for expected in (
        "model.layers.1.mlp.gate_proj",
        "48 x 32",
        "float32",
        "75.00 %",
        "2:8",
        "unstructured",
        "lm_head",
    ):
        assert expected in text
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 120


def test_a_name_that_looks_like_markup_is_shown_as_it_is():
    assert "[red]fc" in str(sparsity_report({"[red]fc.weight": torch.ones(2, 2)}))


def test_a_long_table_goes_by_kind_and_the_data_keeps_all():
    state = {f"layers.{n}.{kind}.weight": torch.ones(4, 8) for n in range(30) for kind in ("q_proj", "k_proj")}
    for n in range(10):
        state[f"layers.{n}.q_proj.weight"] = keep_n_m(torch.randn(4, 8), 2, 4)
    report = sparsity_report(state)
    text = str(report)
    assert len(report) == len(report.to_dict()["modules"]) == 60
    assert len(text.splitlines()) < 15
    assert "q_proj x30" in text and "2:4 x10" in text and "layers.7" not in text


def test_reading_changes_nothing(llama):
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    sparsity_report(llama)
    assert all(torch.equal(tensor, before[name]) for name, tensor in llama.state_dict().items())
    assert all(parameter.requires_grad for parameter in llama.parameters())
