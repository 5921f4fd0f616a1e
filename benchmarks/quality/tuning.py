# SPDX-License-Identifier: Apache-2.0
"""One training run: the same loop for every method, and for the training from scratch."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from peft_spp.pruning.layers import find_target_layers


WARMUP_SHARE = 0.1
MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class TuningSettings:
    """How to train.

    Args:
        rate (`float`): The peak learning rate, after a linear warm-up and before a cosine to zero.
        steps (`int`): Optimizer steps.
        batch (`int`): Sequences in a batch, over all processes.
        seed (`int`): The seed of the order of the data.
        weight_decay (`float`): AdamW's.
        B_rate_ratio (`float`): What the rate of SPP's factor B is multiplied by.
        muon_rate (`float`, *optional*): Train the matrices inside the transformer blocks with Muon, at this peak rate.
        autocast (`bool`): Whether the forward pass runs under bfloat16 autocast.
        micro_batch (`int`, *optional*): The most sequences in one forward pass.
    """

    rate: float
    steps: int
    batch: int
    seed: int
    weight_decay: float = 0.0
    B_rate_ratio: float = 1.0
    muon_rate: float | None = None
    autocast: bool = False
    micro_batch: int | None = None


@dataclass
class TuningRecord:
    """What happened in training.

    Args:
        losses (`list[float]`): The loss of each step, before it.
        seconds (`float`): Wall time of the steps.
        cpu_seconds (`float`): Time of the process on all cores.
        tokens (`int`): Tokens trained on.
    """

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    tokens: int = 0

    @property
    def diverged(self) -> bool:
        """Whether a loss was infinite or NaN."""
        return not all(map(math.isfinite, self.losses))


def order_of_blocks(count: int, steps: int, batch: int, seed: int) -> list[list[int]]:
    """
    Which blocks each step trains on: every block once before any comes again.

    It depends on nothing else, so that all methods see the same tokens in the same order.

    Args:
        count (`int`): The number of blocks.
        steps (`int`): The number of steps.
        batch (`int`): Blocks in a step.
        seed (`int`): The seed.

    Returns:
        `list[list[int]]`: The numbers of the blocks by step.
    """
    endless = _permutations(count, random.Random(seed))
    return [list(itertools.islice(endless, batch)) for _ in range(steps)]


def train(
    model: nn.Module,
    blocks: torch.Tensor,
    settings: TuningSettings,
    accelerator: Accelerator,
    on_step: Callable[[int, float], object] = lambda step, loss: None,
    teacher: nn.Module | None = None,
) -> TuningRecord:
    """
    Train the parameters that are to be trained, with AdamW or, where the settings say so, matrices with Muon.

    Gradients are clipped to a norm of 1. A run whose loss is not finite is stopped at once.

    Args:
        model (`nn.Module`): A causal language model, changed in place.
        blocks (`torch.Tensor`): Token ids of shape (blocks, tokens).
        settings (`TuningSettings`): How to train.
        accelerator (`Accelerator`): The device; and the other processes, among which each batch is divided.
        on_step (`Callable[[int, float], object]`): Called with the number of steps done and the loss.
        teacher (`nn.Module`, *optional*): Instead of predicting the text, come near to the predictions of this model:
            the loss is the Kullback-Leibler divergence from them, in the mean over all tokens.

    Raises:
        ValueError: If the number of processes does not divide the batch.
    """
    if settings.batch % accelerator.num_processes:
        raise ValueError(f"{accelerator.num_processes} processes do not divide a batch of {settings.batch} sequences.")
    optimizers = make_optimizers(model, settings)
    warmup = round(WARMUP_SHARE * settings.steps)
    schedules = [get_cosine_schedule_with_warmup(one, warmup, settings.steps) for one in optimizers]
    trained = [parameter for one in optimizers for group in one.param_groups for parameter in group["params"]]
    wrapped, *optimizers = accelerator.prepare(model.train(), *optimizers)
    part = slice(accelerator.process_index, None, accelerator.num_processes)
    record = TuningRecord()
    wall, cpu = time.perf_counter(), time.process_time()
    for step, numbers in enumerate(order_of_blocks(len(blocks), settings.steps, settings.batch, settings.seed), 1):
        loss = _backward(wrapped, blocks[numbers[part]], settings, accelerator, teacher)
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRADIENT_NORM)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        record.losses.append(accelerator.reduce(loss, "mean").item())
        record.tokens += len(numbers) * blocks.shape[1]
        on_step(step, record.losses[-1])
        if record.diverged:
            break
    record.seconds, record.cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    return record


def make_optimizers(model: nn.Module, settings: TuningSettings) -> list[torch.optim.Optimizer]:
    """
    The optimizers of all parameters that are trained.

    SPP's factors B have a learning rate of their own where the settings say so. With `muon_rate`, the matrices inside
    the transformer blocks go to Muon (https://kellerjordan.github.io/posts/muon) and the rest to AdamW.

    Args:
        model (`nn.Module`): The model.
        settings (`TuningSettings`): How to train.

    Returns:
        `list[torch.optim.Optimizer]`: One or two optimizers.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    matrices, B = [], []
    if settings.muon_rate is not None:
        matrices = [trained.pop(f"{name}.weight") for name in find_target_layers(model, None)]
    if settings.B_rate_ratio != 1.0:
        B = [trained.pop(name) for name in [*trained] if ".spp_B." in name]
    groups: list[dict[str, Any]] = [{"params": list(trained.values())}]
    if B:
        groups.append({"params": B, "lr": settings.rate * settings.B_rate_ratio})
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=settings.rate, weight_decay=settings.weight_decay, fused=True)
    ]
    if settings.muon_rate is not None:
        optimizers.append(torch.optim.Muon(matrices, lr=settings.muon_rate, weight_decay=settings.weight_decay))
    return optimizers


def _backward(
    model: nn.Module,
    blocks: torch.Tensor,
    settings: TuningSettings,
    accelerator: Accelerator,
    teacher: nn.Module | None,
) -> torch.Tensor:
    """Add to the gradients those of the mean loss over blocks, and return that loss."""
    total = torch.zeros((), device=accelerator.device)
    for some in blocks.split(settings.micro_batch or len(blocks)):
        ids = some.to(accelerator.device)
        with _autocast(settings, accelerator.device):
            loss = text_loss(model, ids) if teacher is None else distillation_loss(model, teacher, ids)
            loss = loss * (len(ids) / len(blocks))
        accelerator.backward(loss)
        total += loss.detach()
    return total


def text_loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The mean negative log-likelihood of the next tokens."""
    return cast(torch.Tensor, model(input_ids=ids, labels=ids).loss)


def distillation_loss(model: nn.Module, teacher: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The mean over all tokens of KL(teacher ‖ model) of the distributions of the next token."""
    # with it comes TRL, which nothing else here needs
    from peft_spp.sft.teacher import divergence

    with torch.no_grad():
        wanted = teacher(input_ids=ids).logits.flatten(0, 1)
    return divergence(model(input_ids=ids).logits.flatten(0, 1), wanted) / len(wanted)


def _permutations(count: int, shuffler: random.Random) -> Iterator[int]:
    while True:
        yield from shuffler.sample(range(count), count)


def _autocast(settings: TuningSettings, device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast(device.type, dtype=torch.bfloat16) if settings.autocast else nullcontext()


def as_tensor(blocks: Sequence[Sequence[int]]) -> torch.Tensor:
    """Blocks of tokens of one length as a tensor."""
    return torch.tensor(blocks, dtype=torch.long)
