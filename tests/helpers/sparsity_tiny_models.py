# SPDX-License-Identifier: Apache-2.0
"""Tiny pruned models for the sparsity tests."""

import torch
from torch import Tensor, nn


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2, torch.float8_e4m3fn]


def pruned(rows: int, inputs: int, sparsity: float = 0.5, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    weight = torch.randn(rows, inputs)
    weight[torch.rand(rows, inputs) < sparsity] = 0.0
    return weight


def keep_n_m(rows_by_inputs: Tensor, n: int, m: int) -> Tensor:
    """Zero all but the n largest of every m consecutive inputs."""
    groups = rows_by_inputs.detach().abs().reshape(rows_by_inputs.shape[0], -1, m)
    mask = torch.zeros_like(groups).scatter_(-1, groups.topk(n, dim=-1).indices, 1.0)
    return rows_by_inputs.detach() * mask.reshape(rows_by_inputs.shape)


def half(rows: int, inputs: int) -> Tensor:
    """A 2:4 weight whose other values are far from zero."""
    return keep_n_m(torch.rand(rows, inputs) + 1, 2, 4)


def tiny_llama(tie: bool = False) -> nn.Module:
    """Two layers: q, k, v, o are 2:4, gate is 2:8, up is half zero without a pattern, down is dense."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tie,
    )
    model = LlamaForCausalLM(config)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        kind = name.rpartition(".")[2]
        if kind in ("q_proj", "k_proj", "v_proj", "o_proj"):
            module.weight.data = keep_n_m(module.weight, 2, 4)
        elif kind == "gate_proj":
            module.weight.data = keep_n_m(module.weight, 2, 8)
        elif kind == "up_proj":
            module.weight.data[:, : module.in_features // 2] = 0.0
    return model


def tiny_gpt2() -> nn.Module:
    """Two layers of Conv1D, all of them 2:4 along the inputs, which come first, and not along the outputs."""
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=4))
    for module in model.modules():
        if isinstance(module, Conv1D):
            module.weight.data = keep_n_m(module.weight.data.T, 2, 4).T.contiguous()
    return model
