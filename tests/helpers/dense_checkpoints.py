# SPDX-License-Identifier: Apache-2.0
"""Small dense checkpoints to prune, and the memory that it takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.profiler import ProfilerActivity, profile

from peft_spp.demo.data import train_tokenizer

from helpers.merge_cases import edit_json
from helpers.tiny import tiny, tiny_llama


TEXT = " ".join(f"sentence {number} of the calibration text says {number * 7 % 13}." for number in range(400))
SMALL = {"samples": 4, "sequence_length": 32}
MODELS = {
    "llama": ("LlamaForCausalLM", {"num_key_value_heads": 2}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "opt": (
        "OPTForCausalLM",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 48,
            "word_embed_proj_dim": 32,
        },
    ),
    "neox": (
        "GPTNeoXForCausalLM",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48},
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}


def save_model(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, **settings) -> Path:
    """A tiny dense model in shards, with a tokenizer and a generation config."""
    tokenizer = train_tokenizer([TEXT], vocab_size=300)
    class_name, kind_settings = MODELS[kind]
    common = {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0}
    make = tiny_llama if kind == "llama" else lambda **arguments: tiny(class_name, **arguments)
    model = make(**{**common, "pad_token_id": 1, **kind_settings, **settings}).to(dtype)
    model.save_pretrained(folder, max_shard_size="40KB")
    tokenizer.save_pretrained(folder)
    return folder


def edit_shards(model: Path, **changes: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
    """Change tensors of a sharded model, or remove those that are `None`, from the index as well."""
    index = json.loads((model / "model.safetensors.index.json").read_text())
    for name, change in changes.items():
        file = model / index["weight_map"][name]
        tensors = load_file(file)
        tensors[name] = change(tensors[name]) if change else None
        if tensors[name] is None:
            del tensors[name], index["weight_map"][name]
        save_file(tensors, file, metadata={"format": "pt"})
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def edit_config(**changes: object) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        edit_json(model / "config.json", **changes)

    return edit


def peak_of_tensors(run: Callable[[], object]) -> int:
    """The most bytes that tensors took at a time: the running total of what PyTorch's allocator records."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    level = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return peak
