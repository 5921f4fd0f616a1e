# SPDX-License-Identifier: Apache-2.0
"""
The tables of `docs/planning.md`: `python -m benchmarks.planning`.

Plans of Llama 3 with 8B and 70B, which are computed, and for small models the plan next to the memory that a step
takes on this CPU, by the allocator's account (`benchmarks.harness.memory`). These are exact numbers, not samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from peft_spp import SPPConfig, compress
from peft_spp.checkpoints.empty_model import default_dtype
from peft_spp.durable import write_text
from peft_spp.planning import TrainingPlan, plan_training
from peft_spp.pruning import prune_magnitude

from .docs import put
from .harness.memory import storage_bytes, trace_memory


PAGE = Path("docs/planning.md")
LARGE: dict[str, dict[str, Any]] = {
    "7B": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
STORED = {"dense": None, "50 %": 0.5, "75 %": 0.75}


@dataclass(frozen=True)
class Small:
    """A model that is measured, and the batch.

    Args:
        settings (`dict[str, Any]`): Of its configuration.
        batch (`int`): Sequences in the batch.
        sequence (`int`): Tokens in a sequence.
        experts (`tuple[str, ...]`): The stacks of experts to adapt; with any, the model is a Mixtral.
    """

    settings: dict[str, Any]
    batch: int
    sequence: int
    experts: tuple[str, ...] = ()

    @property
    def config(self) -> SPPConfig:
        """The adapter."""
        return SPPConfig(task_type="CAUSAL_LM", target_parameters=list(self.experts))


SMALL = {
    "3.2M": Small(
        {
            "hidden_size": 256,
            "intermediate_size": 704,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "vocab_size": 512,
        },
        batch=2,
        sequence=256,
    ),
    "44M": Small(
        {
            "hidden_size": 512,
            "intermediate_size": 1408,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "vocab_size": 16384,
        },
        batch=1,
        sequence=512,
    ),
    "mixture, 11M": Small(
        {
            "hidden_size": 256,
            "intermediate_size": 352,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "vocab_size": 4096,
        },
        batch=2,
        sequence=256,
        experts=("experts.gate_up_proj", "experts.down_proj"),
    ),
}

app = typer.Typer(add_completion=False)


@app.command()
def main(page: Annotated[Path, typer.Option(help="The page to write into.", exists=True)] = PAGE) -> None:
    """Write the tables of the page on planning."""
    text = page.read_text()
    for name, lines in (("plans", large_table()), ("measured", small_table())):
        text = put(text, name, "\n".join(lines))
        typer.echo(f"{name}: written")
    write_text(page, text)


def large_table() -> Iterator[str]:
    """Lines of the table of plans."""
    yield "| model, GPUs | zeros not stored | base model | step | step, checkpointing | total | total, checkpointing |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for size, gpus in (("8B", 1), ("8B", 8), ("70B", 1), ("70B", 8)):
        for stored, sparsity in STORED.items():
            plain, checkpointed = (
                plan_training(
                    llama(LARGE[size], torch.bfloat16, "meta"),
                    sparsity=sparsity,
                    gpus=gpus,
                    gradient_checkpointing=enabled,
                )
                for enabled in (False, True)
            )
            base = plain.weights + plain.gathered
            cells = [base, plain.step, checkpointed.step, plain.total, checkpointed.total]
            where = f"{gpus} GPUs, FSDP2" if gpus > 1 else "one GPU"
            yield f"| {size}, {where} | {stored} | {' | '.join(f'{one / 1e9:.1f}' for one in cells)} |"


def small_table() -> Iterator[str]:
    """Lines of the table of plans and measurements."""
    yield "| model | dtype | zeros not stored | checkpointing | computed, MB | measured, MB | computed ÷ measured |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for name, small in SMALL.items():
        for dtype in (torch.float32, torch.bfloat16):
            for sparsity in (None, 0.5):
                for enabled in (False, True):
                    plan = plan_of(small, dtype, sparsity, enabled)
                    measured = measure(small, dtype, sparsity, enabled)
                    stored = "dense" if sparsity is None else f"{100 * sparsity:.0f} %"
                    yield (
                        f"| {name} | {str(dtype).removeprefix('torch.')} | {stored} | {'on' if enabled else 'off'} | "
                        f"{plan.total / 1e6:.1f} | {measured / 1e6:.1f} | {plan.total / measured:.3f} |"
                    )


def plan_of(small: Small, dtype: torch.dtype, sparsity: float | None, checkpointing: bool) -> TrainingPlan:
    """The plan of a small model on a CPU."""
    return plan_training(
        small_model(small, dtype, "meta"),
        config=small.config,
        batch=small.batch,
        sequence=small.sequence,
        sparsity=sparsity,
        gradient_checkpointing=checkpointing,
        on_cpu=True,
    )


def measure(small: Small, dtype: torch.dtype, sparsity: float | None, checkpointing: bool) -> int:
    """The bytes that its second training step takes at the highest, with all that stays between steps."""
    model: Any = small_model(small, dtype, "cpu")
    if sparsity is not None:
        prune_magnitude(model, sparsity=sparsity)
        compress(model)
    return measure_model(model, small.config, small.batch, small.sequence, checkpointing)


def measure_model(model: Any, config: SPPConfig | None, batch: int, sequence: int, checkpointing: bool) -> int:
    """The same of any model, which is changed."""
    model.requires_grad_(False)
    adapted: Any = get_peft_model(model, config or SPPConfig()).train()
    if checkpointing:
        adapted.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(parameter for parameter in adapted.parameters() if parameter.requires_grad)
    # of equal tokens all would go to the same experts
    ids = torch.randint(model.config.vocab_size, (batch, sequence))

    def step() -> None:
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    static = storage_bytes([*adapted.parameters(), *adapted.buffers(), *states])
    return static + trace_memory(step, torch.device("cpu")).peak


def small_model(small: Small, dtype: torch.dtype, device: str) -> nn.Module:
    """A small model of random weights, or of none on the meta device."""
    if not small.experts:
        return llama(small.settings, dtype, device)
    torch.manual_seed(0)
    with default_dtype(dtype), torch.device(device):
        return MixtralForCausalLM(MixtralConfig(**small.settings, use_cache=False, max_position_embeddings=8192))


def llama(settings: dict[str, Any], dtype: torch.dtype, device: str) -> LlamaForCausalLM:
    """A Llama of random weights, or of none on the meta device."""
    torch.manual_seed(0)
    with default_dtype(dtype), torch.device(device):
        return LlamaForCausalLM(LlamaConfig(**settings, use_cache=False, max_position_embeddings=8192))


if __name__ == "__main__":
    app()
