# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from peft_spp import SPPConfig
from peft_spp.inference import to_semi_structured
from peft_spp.inference.semi_structured import SemiStructuredReport, choose_layers, measure_speedup
from peft_spp.pruning import prune_magnitude

from helpers.tiny import randomize, tiny_llama


@pytest.fixture
def merged() -> nn.Module:
    """A merged model of shapes that the kernels know, 2:4 but for one layer."""
    model = tiny_llama(hidden_size=128, intermediate_size=192, num_hidden_layers=2).to(torch.bfloat16)
    prune_magnitude(model, pattern="2:4", exclude_modules=r".*\.1\.mlp\.down_proj")
    adapted = get_peft_model(model, SPPConfig(r=4, task_type="CAUSAL_LM"))
    randomize(adapted)
    return adapted.merge_and_unload()


def test_layers_are_chosen_by_what_the_kernels_know(merged: nn.Module) -> None:
    chosen, skipped = choose_layers(merged)
    assert len(chosen) == 13 and all(name.startswith("model.layers.") for name in chosen)
    assert skipped == {"model.layers.1.mlp.down_proj": "not 2:4", "lm_head": "not 2:4"}
    chosen, skipped = choose_layers(merged, target_modules=["q_proj", "k_proj"], exclude_modules=r".*\.0\..*")
    assert list(chosen) == [f"model.layers.1.self_attn.{name}_proj" for name in "qk"]
    assert skipped["lm_head"] == "not in target_modules"
    assert skipped["model.layers.0.self_attn.q_proj"] == "in exclude_modules"


def test_names_come_from_any_iterable_and_misspelled_ones_are_told(merged: nn.Module) -> None:
    with pytest.warns(UserWarning, match="exclude_modules: no linear layer of the model matches 'o_poj'"):
        chosen, _ = choose_layers(merged, (f"{one}_proj" for one in "qo"), (name for name in ("q_proj", "o_poj")))
    assert list(chosen) == [f"model.layers.{n}.self_attn.o_proj" for n in range(2)]
    with pytest.warns(UserWarning, match="target_modules: no linear layer of the model matches 'o_poj'"):
        choose_layers(merged, ["o_poj", "q_proj"])


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Linear(128, 64, dtype=torch.float16), None),
        (nn.Linear(128, 64), "float32, not float16"),
        (nn.Linear(128, 48, dtype=torch.bfloat16), "multiples of 32 x 64"),
        (nn.Linear(96, 64, dtype=torch.bfloat16), "multiples of 32 x 64"),
        (nn.modules.linear.NonDynamicallyQuantizableLinear(128, 64, dtype=torch.float16), "not a plain nn.Linear"),
    ],
)
def test_shapes_and_dtypes(layer: nn.Linear, reason: str | None) -> None:
    prune_magnitude(layer, pattern="2:4", target_modules=".*")
    chosen, skipped = choose_layers(nn.ModuleDict({"fc": layer}))
    assert list(chosen) == ([] if reason else ["fc"])
    assert (reason or "") in skipped.get("fc", "")


def test_int8_weights_are_told_by_their_values() -> None:
    layer = nn.Linear(128, 64)
    weight = torch.randint(-5, 6, (64, 128), dtype=torch.int8)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    assert choose_layers(nn.ModuleList([layer]))[1] == {"0": "not 2:4"}
    weight.view(-1, 4)[:, ::2] = 0
    assert list(choose_layers(nn.ModuleList([layer]))[0]) == ["0"]


def test_packing_the_chosen_layers_loses_nothing(merged: nn.Module) -> None:
    """The format itself, which PyTorch also makes on a CPU: half of the values, and a bit for each weight."""
    for name, layer in choose_layers(merged)[0].items():
        weight = layer.weight.detach()
        values, places = sparse_semi_structured_from_dense_cutlass(weight)
        assert values.nbytes + places.nbytes == weight.nbytes * 9 // 16, name
        assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, places), weight), name


def test_a_speedup_is_that_of_the_other_weight() -> None:
    layer = nn.Linear(512, 2048)
    assert measure_speedup(layer, torch.zeros(2048, 512), 64) < 20
    # a layer with one output in its place
    layer.bias = None
    assert measure_speedup(layer, torch.zeros(1, 512), 256) > 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="what happens without a GPU")
def test_a_model_on_the_cpu_is_refused_and_stays_as_it_is(merged: nn.Module) -> None:
    before = copy.deepcopy(merged.state_dict())
    with pytest.raises(RuntimeError, match="the model is on cpu"):
        to_semi_structured(merged)
    assert all(torch.equal(value, before[name]) for name, value in merged.state_dict().items())


def test_an_adapter_must_be_merged_first() -> None:
    model = get_peft_model(tiny_llama(), SPPConfig(r=4, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj' has an adapter: merge it first"):
        to_semi_structured(model)


@pytest.mark.parametrize("tokens", [0, -1])
def test_tokens_must_be_positive(merged: nn.Module, tokens: int) -> None:
    with pytest.raises(ValueError, match=f"value passed is {tokens}"):
        to_semi_structured(merged, tokens=tokens)


def test_a_report_tells_what_and_why() -> None:
    report = SemiStructuredReport(64, {"a": 1.25, "b": 1.5}, {"c": "not 2:4", "d": "not 2:4"})
    text = str(report)
    for part in ("2 linear layers packed", "1.25 to 1.50", "64 tokens", "not 2:4: c, d"):
        assert part in text
    assert report.to_dict() == {"tokens": 64, "packed": report.packed, "skipped": report.skipped}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_packed_model_computes_the_same_on_a_gpu(merged: nn.Module) -> None:
    merged = merged.cuda()
    ids = torch.randint(0, 64, (2, 32), device="cuda")
    with torch.no_grad():
        expected = merged(ids).logits
        report = to_semi_structured(merged, tokens=64, min_speedup=0)
        assert len(report.packed) == 13
        torch.testing.assert_close(merged(ids).logits, expected, rtol=2e-2, atol=2e-2)
