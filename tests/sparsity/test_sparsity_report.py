# SPDX-License-Identifier: Apache-2.0
"""What a report says of the weights of a model, from whatever source."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from peft_spp.sparsity import NMPattern, compare_sparsity, sparsity_report

from helpers.sparsity_tiny_models import keep_n_m, tiny_llama


LLAMA_KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LLAMA_PATTERNS = dict.fromkeys(LLAMA_KINDS, "2:4") | {
    "mlp.gate_proj": "2:8",
    "mlp.up_proj": "unstructured",
    "mlp.down_proj": "dense",
}


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
    expected = dict(sparsity_report(llama).modules)
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
    assert dict(report.modules) == expected


def test_asking_for_a_module_that_is_not_there_is_refused_by_name(llama):
    with pytest.raises(ValueError, match="q_porj"):
        sparsity_report(llama, modules=["q_porj"])
    with pytest.raises(ValueError, match=r"matches 'v_porj' of modules=\['q_proj', 'v_porj'\]"):
        sparsity_report(llama, modules=["q_proj", "v_porj"])
    with pytest.raises(ValueError, match="'v_porj'"):
        compare_sparsity(llama, llama, modules=["q_proj", "v_porj"])


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
