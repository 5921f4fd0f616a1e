# SPDX-License-Identifier: Apache-2.0
"""Random models and masks: whatever happens to a compressed model, it is what happens to the dense one."""

import copy
import tempfile
import warnings
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import peft_spp
from peft_spp import SPPConfig
from peft_spp.compressed.checkpoint_run import compress_checkpoint, decompress_checkpoint
from peft_spp.functional import Factors
from peft_spp.functional.compressed import compress, compressed_linear, compressed_weight

from helpers.compressed_cases import same_bits, same_tensors, tensors_of
from helpers.mixtures import expert_weights
from helpers.tiny import block_linears, prune_, randomize, tiny_llama
from helpers.tiny_moe import IDS, PARAMETERS, tiny_moe


LOSS = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
MASKS = ["random", "random", "2:4", "75 %", "empty rows", "full rows", "full", "none", "a corner"]


def spoil_(weight, generator):
    """Give a weight one of the masks, and values that are easily lost."""
    kind = MASKS[int(torch.randint(len(MASKS), (), generator=generator))]
    rows, share = torch.rand(len(weight), 1, generator=generator), torch.rand(weight.shape, generator=generator)
    if kind == "2:4" and weight.shape[1] % 4 == 0:
        prune_(weight, "2:4")
        return
    stored = {
        "75 %": share > 0.75,
        "empty rows": (share > 0.5) & (rows > 0.5),
        "full rows": (share > 0.7) | (rows > 0.8),
        "full": share >= 0.0,
        "none": share < 0.0,
        "a corner": (torch.arange(weight.numel()) == weight.numel() - 1).view(weight.shape),
    }.get(kind, share > 0.5)
    with torch.no_grad():
        weight[~stored] = 0.0
        if kind == "random":
            smallest = torch.finfo(weight.dtype).smallest_normal
            weight[0, :4] = torch.tensor([-0.0, 0.0, smallest / 4, -smallest], dtype=weight.dtype)
            weight[-1, -1] = -0.0


def base_of(kind, dtype, hidden, inner, experts, generator):
    sizes = {"hidden_size": hidden, "intermediate_size": inner}
    if kind == "llama":
        model = tiny_llama(num_attention_heads=4, num_key_value_heads=4, head_dim=8, initializer_range=0.2, **sizes)
    else:
        own = {"num_experts": experts, "moe_intermediate_size": inner} if kind == "qwen3_moe" else {}
        count = {"num_local_experts": experts, "num_experts_per_tok": min(2, experts)}
        model = tiny_moe(kind, **sizes, **count, **own)
    model.to(dtype)
    for weight in (*expert_weights(model).values(), *(one.weight.detach() for one in block_linears(model).values())):
        spoil_(weight, generator)
    return model


def adapted(base, kind, r):
    config = SPPConfig(r=r, target_parameters=[] if kind == "llama" else PARAMETERS)
    model = get_peft_model(base, config)
    torch.manual_seed(1)
    randomize(model)
    return model


def assert_loaded(loaded, stored):
    # Transformers loads the float16 norms of GPT-OSS as float32
    assert same_tensors({name: one.to(stored[name].dtype) for name, one in loaded.items()}, stored)


def check(kind, dtype, hidden, inner, experts, r, seed):
    base = base_of(kind, dtype, hidden, inner, experts, torch.Generator().manual_seed(seed))
    models = [adapted(one, kind, r) for one in (copy.deepcopy(base), peft_spp.compress(copy.deepcopy(base)))]
    losses = [model.train()(input_ids=IDS, labels=IDS).loss for model in models]
    torch.testing.assert_close(losses[1], losses[0], rtol=LOSS[dtype], atol=LOSS[dtype])
    for loss in losses:
        loss.backward()
    dense, small = ({name: one for name, one in model.named_parameters() if one.requires_grad} for model in models)
    assert dense.keys() == small.keys()
    for name, one in small.items():
        if dtype == torch.float32:  # in 16 bits a rounding may choose another expert
            difference = (one.grad - dense[name].grad).norm()
            assert difference <= 1e-4 * dense[name].grad.norm() + 1e-6, name
        with torch.no_grad():  # the same step, so that the weights have the same bits afterwards
            dense[name].copy_(one.sub_(one.grad, alpha=0.1))

    merged = [model.merge_and_unload(safe_merge=True) for model in models]
    assert same_tensors(peft_spp.decompress(copy.deepcopy(merged[1])).state_dict(), merged[0].state_dict())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for which, model in zip(("dense", "small"), merged, strict=True):
            model.save_pretrained(folder / which)
        decompress_checkpoint(folder / "small", folder / "back")
        expected = tensors_of(folder / "dense")
        assert same_tensors(tensors_of(folder / "back"), expected)
        loaded = AutoModelForCausalLM.from_pretrained(folder / "small", dtype="auto")
        loaded.save_pretrained(folder / "again")
        assert_loaded(tensors_of(folder / "again"), tensors_of(folder / "small"))
        assert_loaded(loaded.dequantize().state_dict(), merged[0].state_dict())
        # a merged model is pruned as the base is, and compressed by itself
        compress_checkpoint(folder / "dense", folder / "compressed")
        decompress_checkpoint(folder / "compressed", folder / "back again")
        assert same_tensors(tensors_of(folder / "back again"), expected)


CASES = {
    "kind": st.sampled_from(["mixtral", "qwen3_moe", "gpt_oss", "llama"]),
    "dtype": st.sampled_from(list(LOSS)),
    "hidden": st.sampled_from([32, 64, 72]),
    "inner": st.sampled_from([8, 24, 64, 72]),
    "experts": st.integers(1, 5),
    "r": st.integers(1, 7),
    "seed": st.integers(0, 2**20),
}


@given(**CASES)
@example(kind="gpt_oss", dtype=torch.float16, hidden=32, inner=8, experts=1, r=1, seed=0)
@settings(max_examples=8, deadline=None)
def test_a_compressed_model_goes_the_way_of_the_dense_one(**case):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers without zeros
        check(**case)


@pytest.mark.slow
@given(**CASES)
@settings(max_examples=100, deadline=None)
def test_many_compressed_models_go_the_way_of_the_dense_ones(**case):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(**case)


@given(
    m=st.integers(1, 70),
    n=st.integers(1, 200),
    tokens=st.integers(1, 130),
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=2),
    density=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    dtype=st.sampled_from(list(LOSS)),
    seed=st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_a_fresh_adapter_changes_no_weight_and_outputs_by_the_order_of_sums_at_most(
    m, n, tokens, ranks, density, dtype, seed
):
    generator = torch.Generator().manual_seed(seed)
    stored = torch.rand(m, n, generator=generator) < density
    weight = torch.randn(m, n, generator=generator).mul_(stored).to(dtype)
    x = torch.randn(tokens, n, generator=generator).to(dtype)
    fresh = [Factors(torch.randn(min(r, m), n, generator=generator), torch.zeros(m, 1), 0.5) for r in ranks]
    small = compress(weight)
    assert same_bits(compressed_weight(small, fresh) + 0.0, weight + 0.0)
    y, expected = compressed_linear(x, small, None, fresh), compressed_linear(x, small)
    if tokens * small.values.numel() > 48 * m * n:
        assert torch.equal(y, expected)
    # each of them: products and sums in float32, and one rounding
    products = x.double().abs() @ weight.double().abs().T
    rounded = torch.finfo(dtype).eps * expected.double().abs()
    assert ((y.double() - expected.double()).abs() <= rounded + 2.02 * n * 2.0**-24 * products).all()
