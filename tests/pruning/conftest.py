# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from helpers.dense_checkpoints import TEXT, save_model


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        bos_token_id=0, eos_token_id=0, vocab_size=32, n_embd=16, n_inner=24, n_layer=2, n_head=2, n_positions=32
    )
    return GPT2LMHeadModel(config)


@pytest.fixture
def calibration_batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 32, (2, 12), generator=generator) for _ in range(3)]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(tmp_path / "dense")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"
