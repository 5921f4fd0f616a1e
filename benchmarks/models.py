# SPDX-License-Identifier: Apache-2.0
"""The models that are measured: random weights, pruned to 2:4 by magnitude."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_spp.checkpoints.empty_model import default_dtype
from peft_spp.pruning import prune_magnitude


ModelT = TypeVar("ModelT", bound=nn.Module)


@dataclass(frozen=True)
class Precision:
    """The dtype of the base model and whether the forward pass runs under autocast.

    Args:
        name (`str`): Its name on the command line and in results.
        label (`str`): Its name for readers.
        dtype (`torch.dtype`): Of the base model's weights and of inputs. Adapters of a bfloat16 model are float32, as
            PEFT makes them.
        autocast (`bool`): Whether the forward pass runs under `torch.autocast` to that dtype, as it does in
            Transformers' `Trainer` with `bf16=True`.
    """

    name: str
    label: str
    dtype: torch.dtype
    autocast: bool = False

    def context(self, device: torch.device) -> AbstractContextManager[object]:
        """The context of the forward pass."""
        return torch.autocast(device.type, dtype=self.dtype) if self.autocast else nullcontext()


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("fp32", "float32", torch.float32),
        Precision("bf16", "bfloat16", torch.bfloat16),
        Precision("bf16-autocast", "bfloat16 autocast", torch.bfloat16, autocast=True),
    )
}


class LinearStack(nn.Module):
    """
    Linear layers of one shape, each in a block of its own. They are not called one after another, but singly.

    Args:
        out_features (`int`): m.
        in_features (`int`): n.
        count (`int`): The number of layers.
    """

    def __init__(self, out_features: int, in_features: int, count: int = 1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"linear": nn.Linear(in_features, out_features, bias=False)}) for _ in range(count)
        )

    @property
    def weight(self) -> torch.Tensor:
        """The weight of the first layer, before it is adapted."""
        return cast(nn.Linear, self.linears()[0]).weight

    def linears(self) -> list[nn.Module]:
        """The layers, or what an adapter has put in their places."""
        return [block.get_submodule("linear") for block in self.layers]


def build_linear_stack(
    out_features: int, in_features: int, count: int, dtype: torch.dtype, device: torch.device, seed: int
) -> LinearStack:
    """Linear layers pruned to 2:4, all with the same values in memory of their own."""
    with _initialized_as(dtype, device, seed):
        model = LinearStack(out_features, in_features, 1)
    prune_magnitude(model, pattern="2:4")
    first = model.layers[0]
    model.layers.extend(copy.deepcopy(first) for _ in range(count - 1))
    return model.requires_grad_(False)


def build_llama(config: LlamaConfig, dtype: torch.dtype, device: torch.device, seed: int) -> LlamaForCausalLM:
    """A random Llama whose linear layers inside the blocks are pruned to 2:4, ready for training."""
    with _initialized_as(dtype, device, seed):
        model = LlamaForCausalLM(config)
    prune_magnitude(model, pattern="2:4")
    return model.requires_grad_(False).train()


def copy_with_shared_weights(model: ModelT) -> ModelT:
    """A copy of the model whose parameters are the same objects: what differs is what an adapter will add."""
    return copy.deepcopy(model, memo={id(parameter): parameter for parameter in model.parameters()})


@contextmanager
def _initialized_as(dtype: torch.dtype, device: torch.device, seed: int) -> Iterator[None]:
    torch.manual_seed(seed)
    with default_dtype(dtype), device:
        yield
