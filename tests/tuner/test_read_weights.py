# SPDX-License-Identifier: Apache-2.0
"""Layers whose weight the module that holds them reads, and calls not at all or not always."""

import warnings

import pytest
import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_spp import SPPConfig
from peft_spp.tuner import weight_access
from peft_spp.weight_reads import only_describes_weight

from helpers import reference
from helpers.tiny import prune_, randomize, tiny


MAMBA = {"vocab_size": 64, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 4}
MAMBA2 = {**MAMBA, "num_heads": 4, "head_dim": 8, "n_groups": 2, "chunk_size": 8}
HYBRID = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
JAMBA = {
    **HYBRID,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "num_experts": 2,
    "mamba_d_state": 4,
    "mamba_dt_rank": 4,
    "use_mamba_kernels": False,
    "experts_implementation": "eager",
}
BAMBA = {**HYBRID, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}
WAVLM = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": (16, 16),
    "conv_stride": (2, 2),
    "conv_kernel": (3, 3),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
}
IDS = {"input_ids": torch.arange(24).reshape(2, 12) + 3}


class Encoder(nn.Module):
    """PyTorch's own encoder, which has a fast path in evaluation that calls no layer."""

    def __init__(self, nested: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)

    def forward(self, x, mask=None):
        return self.encoder(x, src_key_padding_mask=mask)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.MultiheadAttention(16, 4, batch_first=True) for _ in range(2)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x, x, x, need_weights=False)[0]
        return x


X = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
AUDIO = torch.randn(2, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
CASES = {
    "encoder": (lambda: Encoder(), {"x": X}),
    "encoder-mask": (lambda: Encoder(), {"x": X, "mask": torch.tensor([[False] * 6, [False] * 4 + [True] * 2])}),
    "attention": (lambda: Attention(), {"x": X}),
    "mamba": (lambda: tiny("MambaForCausalLM", **MAMBA), IDS),
    "falcon-mamba": (lambda: tiny("FalconMambaForCausalLM", **MAMBA), IDS),
    "mamba2": (lambda: tiny("Mamba2ForCausalLM", **MAMBA2), IDS),
    "jamba": (lambda: tiny("JambaForCausalLM", **JAMBA), IDS),
    "bamba": (lambda: tiny("BambaForCausalLM", **BAMBA), IDS),
    "wavlm": (lambda: tiny("WavLMModel", **WAVLM), {"input_values": AUDIO}),
}


def first(output) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def adapted(name: str, **settings):
    """The model with an adapter that changes much, and the outputs of its base."""
    torch.manual_seed(0)
    build, inputs = CASES[name]
    base = build().double().eval()
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
                prune_(parameter, "0.5")
        before = first(base(**inputs))
    model = get_peft_model(base, SPPConfig(r=2, target_parameters=[], **settings)).double()
    randomize(model)
    return model, inputs, before


def layers(model) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


@pytest.mark.parametrize("name", list(CASES))
def test_every_factor_learns_and_merging_changes_nothing(name):
    model, inputs, before = adapted(name)
    output = first(model.train()(**inputs))
    (output * torch.linspace(-1, 1, output.numel()).double().reshape(output.shape)).sum().backward()
    silent = [
        key for key, p in model.named_parameters() if ".spp_" in key and (p.grad is None or not p.grad.abs().sum() > 0)
    ]
    assert not silent
    model.eval()
    with torch.no_grad():
        unmerged = first(model(**inputs))
    assert (unmerged - before).abs().max() > 1e-3
    with_grad = first(model(**inputs))
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(first(model(**inputs)), before)
    with torch.no_grad():
        merged = first(model.merge_and_unload()(**inputs))
    torch.testing.assert_close(unmerged, merged)
    if "mask" in inputs:  # PyTorch's fast path, which is taken without gradients, leaves zeros at padded places
        with_grad, merged = with_grad[~inputs["mask"]], merged[~inputs["mask"]]
    torch.testing.assert_close(with_grad, merged)


@pytest.mark.parametrize("name", list(CASES))
def test_the_weight_of_a_layer_is_that_of_the_formula(name):
    model, _, _ = adapted(name)
    for layer in layers(model).values():
        base = layer.get_base_layer().weight
        weight = layer.weight
        torch.testing.assert_close(weight, reference.effective_weight(base, layer.get_factors(["default"])))
        assert weight.grad_fn is not None and (weight[base == 0] == 0).all()
        layer.merge()
        assert layer.weight is layer.get_base_layer().weight
        layer.unmerge()
        layer.enable_adapters(False)
        assert layer.weight is layer.get_base_layer().weight


def test_gradients_through_a_weight_that_is_read_are_those_of_the_formula():
    model, inputs, _ = adapted("attention", target_modules=["out_proj"])
    model(**inputs).square().sum().backward()
    (layer, other) = layers(model).values()
    factors = [t.detach().requires_grad_() for t in layer._factors("default")]
    weights = []
    for one, (A, B) in ((layer, factors), (other, [t.detach() for t in other._factors("default")])):
        sizes = reference.block_sizes(16, len(A))
        rows = A.repeat_interleave(torch.tensor(sizes), dim=0)
        weights.append(one.get_base_layer().weight.detach() * (1 + one.scaling["default"] * rows * B))
    x = inputs["x"]
    for block, weight in zip(model.base_model.model.blocks, weights, strict=True):
        x, _ = nn.functional.multi_head_attention_forward(
            *[x.transpose(0, 1)] * 3, 16, 4, block.in_proj_weight, block.in_proj_bias, None, None, False, 0.0, weight,
            block.out_proj.get_base_layer().bias, need_weights=False,
        )  # fmt: skip
        x = x.transpose(0, 1)
    x.square().sum().backward()
    for expected, actual in zip(factors, layer._factors("default"), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad)


def test_a_conv1d_is_read_as_it_is_stored():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            from transformers.pytorch_utils import Conv1D

            self.proj = Conv1D(6, 4)

        def forward(self, x):
            return x @ self.proj.weight

    model = get_peft_model(Model(), SPPConfig(r=2, target_modules=["proj"], fan_in_fan_out=True, init_weights=False))
    x = torch.randn(3, 4)
    unmerged = model(x)
    torch.testing.assert_close(unmerged, model.merge_and_unload()(x))


def test_several_adapters_and_scales_are_read_too():
    model, inputs, _ = adapted("attention")
    model.add_adapter("other", SPPConfig(r=3, target_parameters=[]))
    randomize(model.double(), adapter="other")
    model.base_model.set_adapter(["default", "other"])
    with torch.no_grad():
        unmerged = model(**inputs)
        torch.testing.assert_close(unmerged, model.merge_and_unload()(**inputs))


def test_a_weight_that_is_targeted_as_a_parameter_is_read_too():
    model, inputs, _ = adapted("mamba")
    base = model.unload()
    model = get_peft_model(base, SPPConfig(r=2, target_modules=["x_proj"], target_parameters=["dt_proj.weight"]))
    randomize(model.double(), 0.5)
    first(model(**inputs)).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for key, p in model.named_parameters() if "dt_proj" in key and ".spp_" in key)
    with torch.no_grad():
        unmerged = first(model(**inputs))
        torch.testing.assert_close(unmerged, first(model.merge_and_unload()(**inputs)))


def test_dropout_that_cannot_act_is_warned_about():
    model, inputs, _ = adapted("attention", spp_dropout=0.1)
    with pytest.warns(UserWarning, match=r"blocks\.0\.out_proj.*`spp_dropout` has no effect"):
        model.train()(**inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval()(**inputs)


def test_a_batch_with_several_adapters_is_refused_where_a_weight_is_read():
    model, inputs, _ = adapted("attention")
    with pytest.raises(RuntimeError, match=r"blocks\.0\.out_proj.*mixed adapter batches"):
        model.eval()(**inputs, adapter_names=["default", "__base__"])
    model(**inputs)


def test_a_weight_that_is_only_described_is_not_computed(monkeypatch):
    from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaMixer
    from transformers.models.t5.modeling_t5 import T5Attention, T5DenseActDense
    from transformers.models.wavlm.modeling_wavlm import WavLMAttention

    assert only_describes_weight([T5DenseActDense], "wo")
    assert not only_describes_weight([T5DenseActDense], "wi") and not only_describes_weight([T5Attention], "q")
    assert not only_describes_weight([FalconMambaMixer], "dt_proj")
    assert not only_describes_weight([WavLMAttention], "q_proj")
    assert not only_describes_weight([nn.TransformerEncoderLayer], "linear1")

    computed = []
    scaled = weight_access.scaled_weight
    monkeypatch.setattr(weight_access, "scaled_weight", lambda *args, **kw: computed.append(1) or scaled(*args, **kw))
    settings = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    settings["decoder_start_token_id"] = 0
    model = get_peft_model(tiny("T5ForConditionalGeneration", **settings), SPPConfig(r=2))
    model(**IDS, labels=IDS["input_ids"]).loss.backward()
    assert not computed


def test_code_that_reads_in_other_ways():
    class Reader(nn.Module):
        def forward(self, x):
            shape = self.described.weight.shape[0] + self.described.weight.size(1)
            return shape, self.used.weight.data, [layer.weight for layer in (self.used,)], self.described.weight.dtype

    class Inherits(Reader):
        pass

    assert only_describes_weight([Reader], "described") and only_describes_weight([Inherits], "described")
    assert not only_describes_weight([Reader], "used") and not only_describes_weight([Reader], "other")


def by_function(x, layer):
    return nn.functional.linear(x, layer.weight)


class Describes(nn.Module):
    """A block that reads the dtype of a weight, and computes with the weight in another way."""

    def __init__(self, read=None):
        super().__init__()
        self.proj, self.read = nn.Linear(8, 8), read

    def forward(self, x):
        x = x.to(self.proj.weight.dtype)
        if self.read == "alias":
            layer = self.proj
            return nn.functional.linear(x, layer.weight)
        if self.read == "function":
            return by_function(x, self.proj)
        if self.read == "getattr":
            return nn.functional.linear(x, getattr(self.proj, "weight"))  # noqa: B009
        return self.proj(x)


class Calls(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x):
        return self.proj(x.to(self.proj.weight.dtype))


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Calls()

    def forward(self, x):
        return nn.functional.linear(self.block(x), self.block.proj.weight)


@pytest.mark.parametrize(
    "base",
    [*(lambda read=read: Describes(read) for read in ("alias", "function", "getattr")), Around],
    ids=["alias", "function", "getattr", "around"],
)
def test_a_weight_that_is_described_and_computed_with_in_another_place_is_w_prime(base):
    model = get_peft_model(base(), SPPConfig(r=2, target_modules=["proj"], init_weights=False))
    x = torch.randn(3, 8)
    output = model(x)
    output.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for key, p in model.named_parameters() if ".spp_" in key)
    torch.testing.assert_close(output, model.merge_and_unload()(x))


def test_compiled_models_read_it_too():
    model, inputs, _ = adapted("attention")
    expected = model(**inputs)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs), expected)
