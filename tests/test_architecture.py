# SPDX-License-Identifier: Apache-2.0
"""What the tuner, the pruner and the reports take for blocks, linear layers and routers."""

import pytest
import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear
from transformers.models.esm.modeling_esmfold import EsmFoldLinear
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.idefics.modeling_idefics import IdeficsDecoupledLinear
from transformers.models.llama4.modeling_llama4 import Llama4Router, Llama4TextConfig
from transformers.models.phimoe.modeling_phimoe import PhimoeConfig, PhimoeTopKRouter
from transformers.pytorch_utils import Conv1D

from peft_spp import SPPConfig
from peft_spp.architecture import (
    find_block_lists,
    is_linear_layer,
    is_router,
    linear_layers_in_blocks,
    why_not_linear_map,
)
from peft_spp.pruning import prune_magnitude
from peft_spp.sparsity import sparsity_report

from helpers.tiny import tiny


MOE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
MIXTURES = {
    "qwen2-moe": (
        "Qwen2MoeForCausalLM",
        {**MOE, "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    ),
    "llama4": ("Llama4ForCausalLM", {**MOE, "intermediate_size_mlp": 48, "num_local_experts": 4, "head_dim": 8}),
    "switch": ("SwitchTransformersForConditionalGeneration", {**T5, "num_experts": 4}),
    "hunyuan": ("HunYuanMoEV1ForCausalLM", {**MOE, "num_experts": 4, "head_dim": 8}),
    "t5": ("T5ForConditionalGeneration", T5),
}


def mixture(name: str) -> nn.Module:
    class_name, settings = MIXTURES[name]
    return tiny(class_name, **settings)


@pytest.mark.parametrize("name", list(MIXTURES))
def test_tuner_pruner_and_report_agree(name, tmp_path):
    model = mixture(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(0.5, 1.0)
    adapted = get_peft_model(model, SPPConfig(r=2, target_parameters=[]))
    tuner = {
        key.removeprefix("base_model.model.") for key, m in adapted.named_modules() if isinstance(m, BaseTunerLayer)
    }
    model = adapted.unload()
    lists = find_block_lists(dict(model.named_modules()))
    report = sparsity_report(model).modules
    reported = {key for key, m in report.items() if key.startswith(tuple(lists)) and len(m.shape) == 2}
    assert tuner == reported

    if name in ("switch", "t5"):
        assert set(lists) == {"encoder.block", "decoder.block"}
        return
    prune_magnitude(model, sparsity=0.5)
    assert {key for key, m in model.named_modules() if is_linear_layer(m) and (m.weight == 0).any()} == tuner
    # from disk, by names alone: no zero where nothing was pruned, and the routers are told as such
    model.save_pretrained(tmp_path)
    on_disk = sparsity_report(tmp_path)
    assert {key for key, m in on_disk.modules.items() if m.zeros and ".experts" not in key} == tuner
    assert all(m.zeros for key, m in on_disk.modules.items() if ".experts" in key)
    assert any(reason == "router" for reason in on_disk.skipped.values())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.mlp.gate", True),
        ("model.layers.0.mlp.shared_expert_gate", True),
        ("model.layers.0.feed_forward.router", True),
        ("transformer.blocks.0.ffn.router.layer", True),
        ("model.layers.0.mlp.router.gate", True),
        ("model.layers.0.mlp.gate.wg", True),
        ("model.layers.0.mlp.router_gate", True),
        ("model.layers.0.router.proj", True),
        ("encoder.block.1.layer.1.mlp.router.classifier", True),
        ("model.layers.0.mlp.gate.router_mlp.fc1", True),
        ("model.layers.0.altup.modality_router", True),
        ("base_model.model.model.layers.0._checkpoint_wrapped_module.mlp.gate.base_layer", True),
        ("model.layers.0.mlp.gate_proj", False),
        ("model.layers.0.mlp.gate_up_proj", False),
        ("model.layers.0.self_attn.output_gate", False),
        ("model.layers.0.per_layer_input_gate", False),
        ("model.layers.0.self_attn.forget_gate.f_a_proj", False),
        ("model.decoder.layers.0.gateway.gate", False),
        ("model.layers.0.mlp.shared_expert.gate_proj", False),
    ],
)
def test_routers_by_name(name, expected):
    assert is_router(name) is expected


def test_a_list_of_bare_linear_layers_is_no_list_of_blocks():
    model = nn.ModuleDict(
        {
            "heads": nn.ModuleList([nn.Linear(64, 64) for _ in range(4)]),
            "layers": nn.ModuleList([nn.Sequential(nn.Linear(4, 4))]),
        }
    )
    assert linear_layers_in_blocks(dict(model.named_modules())) == {"layers.0.0": "layers"}


class Clamped(nn.Linear):
    def forward(self, x):
        return super().forward(x).clamp(-1.0, 1.0)


class Rescaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 1.001


class Written(nn.Linear):
    def forward(self, x):
        return torch.einsum("...i,oi->...o", x, self.weight) + self.bias


class Other(Conv1D):
    def forward(self, x):
        return super().forward(x).relu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("layer", "linear"),
    [
        (lambda: nn.Linear(32, 48), True),
        (lambda: NonDynamicallyQuantizableLinear(32, 48), True),
        (lambda: FalconLinear(32, 48), True),
        (lambda: EsmFoldLinear(32, 48), True),
        (lambda: Written(32, 48), True),
        (lambda: Conv1D(48, 32), True),
        (lambda: IdeficsDecoupledLinear(32, 48, out_additional_features=0, bias=True), True),
        (lambda: IdeficsDecoupledLinear(32, 48, out_additional_features=4, bias=True), False),
        (lambda: DeepseekV4GroupedLinear(32, 64, 4), False),
        (lambda: DeepseekV4GroupedLinear(32, 64, 1), False),
        (lambda: Llama4Router(Llama4TextConfig(hidden_size=32, num_local_experts=4)), False),
        (lambda: PhimoeTopKRouter(PhimoeConfig(hidden_size=32, num_local_experts=4)), False),
        (lambda: Clamped(32, 48), False),
        (lambda: Other(48, 32), False),
    ],
)
def test_a_class_of_linear_layers_is_asked_what_it_computes(layer, linear, dtype):
    torch.manual_seed(0)
    layer = layer().to(dtype)
    state = torch.get_rng_state()
    assert (why_not_linear_map(layer) is None) is linear
    assert not linear or torch.equal(torch.get_rng_state(), state)


def test_a_small_difference_counts():
    assert why_not_linear_map(Rescaled(32, 48)) == "its output is not `x @ weight.T + bias`"


def test_on_the_meta_device_the_shapes_tell():
    with torch.device("meta"):
        assert "raises" in why_not_linear_map(DeepseekV4GroupedLinear(32, 64, 4))
        assert why_not_linear_map(FalconLinear(32, 48)) is None


def test_an_empty_place_in_a_list_of_blocks():
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)), None])
    assert list(linear_layers_in_blocks(dict(model.named_modules()))) == ["layers.0.0"]
