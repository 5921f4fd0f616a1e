# SPDX-License-Identifier: Apache-2.0
"""
What a wrong start of SPP does to the first losses: `python -m benchmarks.first_loss`.

A small Llama is trained on the documentation that every CPython ships, pruned to 50 % with Wanda, and adapted in the
right way and in wrong ones. Each is trained for ten steps with the SPP authors' learning rate, without warm-up. What
is compared is the loss of the first step and the largest of the ten, and other numbers that a log may call the loss.

The logits of a Llama are what its head makes of a normalized vector, so no finite adapter in its blocks can bring the
mean loss above `2 · max |w ⊙ g| · √d + log V`, with w the rows of the head, g the scales of the last norm, d the width
and V the vocabulary. The bound of this model is printed too.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import cast

import torch
import typer
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, set_seed

from peft_spp import SPPConfig, SPPLayer
from peft_spp.demo.config import DemoConfig
from peft_spp.demo.data import join_texts, split_topics, token_blocks, train_tokenizer
from peft_spp.demo.display import make_progress, quiet_libraries
from peft_spp.demo.training import ProgressCallback, train_dense
from peft_spp.pruning import prune_wanda

from .harness import BenchmarkResult, Case, make_console, print_table
from .harness import options as opt
from .pruning import QUICK_SIZE, calibration_data


NAME = "first_loss"
RIGHT = "as it is"
STEPS = 10
LEARNING_RATE = 4e-3
# the scale that PyTorch's GradScaler begins with, by which a loss in float16 is multiplied before the backward pass
FLOAT16_SCALE = 65536.0

app = typer.Typer(add_completion=False)


@app.command()
def main(
    threads: opt.ThreadsOption = None,
    seed: opt.SeedOption = 0,
    machine: opt.MachineOption = None,
    output_dir: opt.OutputOption = opt.DEFAULT_OUTPUT,
    quick: opt.QuickOption = False,
) -> None:
    """Compare the first losses of right and wrong starts."""
    run = opt.start_run(NAME, opt.Device.cpu, machine, output_dir, threads, quick)
    config = replace(QUICK_SIZE if quick else DemoConfig(), seed=seed)
    model, batches = pruned_model(config)
    result = run.new_result(RIGHT, bound=loss_bound(model), learning_rate=LEARNING_RATE, size=vars(config))
    for name, spoil in STARTS.items():
        result.cases.append(measure(name, model, batches, spoil, seed))
    result.save(run.json_path)
    report(result)
    make_console().print(f"Written: {run.json_path}")


def pruned_model(config: DemoConfig) -> tuple[PreTrainedModel, list[torch.Tensor]]:
    """A trained model that is pruned to 50 %, and batches to train on."""
    set_seed(config.seed)
    texts, _ = split_topics(topics, config.held_out_fraction, config.seed)
    tokenizer = train_tokenizer(texts, config.vocab_size)
    dataset = token_blocks(tokenizer, join_texts(texts), config.block_size)
    with tempfile.TemporaryDirectory() as folder, quiet_libraries(), make_progress(make_console()) as progress:
        callback = ProgressCallback(progress, "Train a small Llama")
        model = train_dense(config, tokenizer, dataset, Path(folder), callback).eval()
    batches = calibration_data(dataset, replace(config, calibration_batches=STEPS))
    prune_wanda(model, batches, sparsity=0.5)
    return model, batches


def loss_bound(model: PreTrainedModel) -> float:
    """What the mean loss cannot exceed while the head and the last norm are what they are."""
    head, scales = model.lm_head.weight.detach(), model.model.norm.weight.detach()
    largest = (head * scales).norm(dim=1).max().item() * math.sqrt(head.shape[1])
    return 2 * largest + math.log(head.shape[0])


def measure(
    name: str, model: PreTrainedModel, batches: list[torch.Tensor], spoil: Callable[[SPPLayer], None], seed: int
) -> Case:
    """
    Train a copy of the model for some steps.

    Args:
        name (`str`): What the start is called.
        model (`PreTrainedModel`): The pruned model.
        batches (`list[torch.Tensor]`): Token ids, a batch a step.
        spoil (`Callable[[SPPLayer], None]`): Makes the start what it is, layer by layer.
        seed (`int`): Seed of the factors.

    Returns:
        `Case`: The losses.
    """
    set_seed(seed)
    adapted: PeftModel = get_peft_model(copy.deepcopy(model), SPPConfig(task_type="CAUSAL_LM"))
    with torch.no_grad():
        for layer in adapted.modules():
            if isinstance(layer, SPPLayer):
                spoil(layer)
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=LEARNING_RATE)
    losses = []
    for batch in batches[:STEPS]:
        loss = adapted(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    tokens = batches[0].numel() - len(batches[0])
    others = {"sum_over_tokens": losses[0] * tokens, "scaled_for_float16": losses[0] * FLOAT16_SCALE}
    return Case({"start": name}, values={name: {"first": losses[0], "largest": max(losses), **others}})


def _factor(factors: nn.ModuleDict) -> torch.Tensor:
    return cast(torch.Tensor, factors["default"].weight)


def _as_it_is(layer: SPPLayer) -> None:
    pass


def _random_b(layer: SPPLayer) -> None:
    _factor(layer.spp_B).uniform_(-1, 1)


def _no_scaling(layer: SPPLayer) -> None:
    _factor(layer.spp_B).uniform_(-1, 1)
    layer.scaling["default"] = layer.spp_alpha["default"]


def _normal_factors(layer: SPPLayer) -> None:
    _factor(layer.spp_A).normal_()
    _factor(layer.spp_B).normal_()


def _left_in_memory(layer: SPPLayer) -> None:
    """Factors as they may be found in memory that nobody has set."""
    _factor(layer.spp_A).normal_(std=1e6)
    _factor(layer.spp_B).normal_(std=1e6)


STARTS: dict[str, Callable[[SPPLayer], None]] = {
    RIGHT: _as_it_is,
    "B random in (-1, 1)": _random_b,
    "B random, alpha not divided by r": _no_scaling,
    "A and B from a normal distribution": _normal_factors,
    "A and B of size 1e6": _left_in_memory,
}


def report(result: BenchmarkResult) -> None:
    """Print the losses."""
    rows = []
    for case in result.cases:
        (values,) = case.values.values()
        rows.append(
            [
                case.parameters["start"],
                f"{values['first']:.2f}",
                f"{values['largest']:.2f}",
                f"{values['sum_over_tokens']:,.0f}",
                f"{values['scaled_for_float16']:,.0f}",
            ]
        )
    headings = ["start", "first loss", f"largest of {STEPS}", "first, summed", "first × 65,536"]
    print_table(make_console(), headings, rows, numbers_from=1)
    make_console().print(f"No finite adapter can bring the loss of this model above {result.settings['bound']:.1f}.")


if __name__ == "__main__":
    app()
