# SPDX-License-Identifier: Apache-2.0
"""
Measure saved models with plain Transformers: a separate script, which the demo runs in a new process.

    python check_saved_models.py HELD_OUT_TEXT BLOCK_SIZE MODEL_FOLDER...

Everything is computed from the files: the perplexity on the held-out text, and the sparsity of the linear layers
without the language model head. Prints a JSON list with one object for each model.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


@torch.no_grad()
def perplexity(model: PreTrainedModel, token_ids: torch.Tensor) -> float:
    """The perplexity on blocks of tokens, a `(blocks, block_size)` tensor, of which each stands alone."""
    # Each block predicts the same number of tokens, so the mean over blocks is the mean over tokens.
    losses = [model(block[None], labels=block[None]).loss.item() for block in token_ids]
    return math.exp(sum(losses) / len(losses))


def sparsity(model: PreTrainedModel) -> dict[str, float]:
    """The share of zeros, and the share of groups of four weights along the input with at most two that are not."""
    head = model.get_output_embeddings()
    weights = [layer.weight for layer in model.modules() if isinstance(layer, nn.Linear) and layer is not head]
    groups = torch.cat([weight.detach().reshape(-1, 4) for weight in weights])
    return {
        "sparsity": (groups == 0).double().mean().item(),
        "groups_2_4": (groups.count_nonzero(dim=1) <= 2).double().mean().item(),
    }


def main(text_file: str, block_size: int, folders: list[str]) -> None:
    text = Path(text_file).read_text(encoding="utf-8")
    checks = []
    for folder in folders:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        model, loading_info = loaded
        if any(loading_info.values()):
            raise RuntimeError(f"The files of {folder} do not match the model: {loading_info}")
        token_ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text)["input_ids"])
        blocks = token_ids[: len(token_ids) // block_size * block_size].reshape(-1, block_size)
        checks.append({"perplexity": perplexity(model, blocks), **sparsity(model)})
    if "peft_spp" in sys.modules:
        raise RuntimeError("peft_spp has been imported, so this does not show that plain Transformers is enough.")
    print(json.dumps(checks))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
