# SPDX-License-Identifier: Apache-2.0
"""The training step that `training_step` times and `memory` weighs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from .competitors import Competitor
from .harness.options import Device
from .models import Precision, copy_with_shared_weights


# full fine-tuning of a 7B model takes a GPU of its own, and training_step has all models in memory together
MAIN_COMPETITORS = {
    Device.cpu: [
        "base",
        "lora",
        "ia3",
        "hira",
        "masked_lora",
        "masked_full",
        "spp_authors_repeat",
        "spp_authors_loop",
        "spp",
    ],
    Device.cuda: ["base", "lora", "ia3", "hira", "masked_lora", "spp_authors_repeat", "spp_authors_loop", "spp"],
}
MAIN_PRECISIONS = ["fp32", "bf16"]


@dataclass(frozen=True)
class TrainingSize:
    """The shape of a Llama and of the batch it is trained on.

    Args:
        hidden (`int`): The width of the model.
        intermediate (`int`): The width inside the feed-forward part.
        layers (`int`): The number of transformer blocks.
        heads (`int`): The number of attention heads.
        vocabulary (`int`): The number of tokens there are.
        batch (`int`): The sequences in a batch.
        sequence (`int`): The tokens in a sequence.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    batch: int
    sequence: int

    def config(self) -> LlamaConfig:
        """The configuration of the model."""
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=self.sequence,
            use_cache=False,
        )

    def describe(self, model: nn.Module) -> dict[str, Any]:
        """The sizes and the number of the model's parameters, ready for JSON."""
        return {**asdict(self), "parameters": sum(parameter.numel() for parameter in model.parameters())}


# 98 million parameters and 1024 tokens; Llama-7B and 8192 tokens
SIZES = {
    Device.cpu: TrainingSize(768, 2048, 12, 12, 8192, batch=2, sequence=512),
    Device.cuda: TrainingSize(4096, 11008, 32, 32, 32000, batch=4, sequence=2048),
}
QUICK_SIZE = TrainingSize(32, 64, 2, 2, 64, batch=2, sequence=8)


def choose_size(device: Device, quick: bool, batch: int | None, sequence: int | None) -> TrainingSize:
    """The size for a device, with another batch if asked."""
    size = QUICK_SIZE if quick else SIZES[device]
    return TrainingSize(**{**asdict(size), "batch": batch or size.batch, "sequence": sequence or size.sequence})


def title_of(settings: dict[str, Any]) -> str:
    """The model and the batch in words, for titles."""
    size = settings["size"]
    parameters = size["parameters"]
    count = f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.0f}M"
    return f"Llama with {count} parameters, {size['batch'] * size['sequence']} tokens"


class TrainingStep:
    """
    Forward pass with labels, backward pass, AdamW step, and gradients dropped.

    The frozen weights are those of the base model, shared by all competitors; only what an adapter adds is new. AdamW
    is PyTorch's with its default settings.

    Args:
        competitor (`Competitor`): How to adapt the model.
        base (`LlamaForCausalLM`): The frozen base model; it is not changed.
        size (`TrainingSize`): For the batch.
        precision (`Precision`): Whether the forward pass runs under autocast.
    """

    def __init__(
        self, competitor: Competitor, base: LlamaForCausalLM, size: TrainingSize, precision: Precision, seed: int = 0
    ) -> None:
        self.llama = copy_with_shared_weights(base)
        torch.manual_seed(seed)
        with _old_names_of_checkpointing():
            self.model = competitor.adapt(self.llama).train()
        self.precision = precision
        self.device = base.device
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4) if self.trained else None
        if not self.trained:
            # without this there would be no backward pass at all
            self.llama.enable_input_require_grads()
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, size.vocabulary, (size.batch, size.sequence), generator=generator)
        self.ids = ids.to(self.device)

    def set_checkpointing(self, enabled: bool) -> None:
        """Whether each transformer block is computed again in the backward pass (not re-entrant)."""
        with _old_names_of_checkpointing():
            if enabled:
                self.llama.gradient_checkpointing_enable({"use_reentrant": False})
            else:
                self.llama.gradient_checkpointing_disable()

    def forward(self) -> torch.Tensor:
        """The loss on the batch."""
        with self.precision.context(self.device):
            return cast(torch.Tensor, self.model(input_ids=self.ids, labels=self.ids).loss)

    def drop_gradients(self) -> None:
        """Also those that a run which did not end has left."""
        for parameter in self.trained:
            parameter.grad = None

    def optimizer_state(self) -> list[torch.Tensor]:
        """The tensors that the optimizer keeps between steps."""
        states = [] if self.optimizer is None else self.optimizer.state.values()
        return [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]

    def __call__(self) -> None:
        self.forward().backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


@contextmanager
def _old_names_of_checkpointing() -> Iterator[None]:
    """Without the warnings that Transformers has renamed them: the new names came in the middle of version 5."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*gradient_checkpointing")
        yield
