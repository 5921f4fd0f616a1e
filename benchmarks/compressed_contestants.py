# SPDX-License-Identifier: Apache-2.0
"""What `benchmarks.compressed_layers` times: the same weights, dense and compressed, in all the ways of using them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_spp.functional import spp_linear
from peft_spp.functional.bitmask import Compressed
from peft_spp.functional.compressed import compressed_linear
from peft_spp.functional.factors import Factors
from peft_spp.functional.kernels import by_activation
from peft_spp.functional.kernels.cpu import backend, bitmask, bitmask_tokens
from peft_spp.functional.kernels.scaled import ScaledWeight

from .dense_tokens import dense_tokens, load
from .harness import Contestant
from .other_layers import other_layers


RANK = 16
TRAINING_TOKENS = 512


def prune(weight: Tensor, pattern: str) -> Tensor:
    """
    The largest values of each row, or of each group of M.

    Args:
        weight (`torch.Tensor`): shape `(m, n)`.
        pattern (`str`): The share of zeros, or N:M.
    """
    if ":" in pattern:
        keep, group = map(int, pattern.split(":"))
    else:
        group = weight.shape[1]
        keep = round(group * (1 - float(pattern)))
    groups = weight.view(-1, group)
    places = groups.abs().topk(keep, dim=1).indices
    return torch.zeros_like(groups).scatter_(1, places, groups.gather(1, places)).view_as(weight)


class Layers:
    """The same weights in all the ways that they are used in.

    Args:
        dense (`list[torch.Tensor]`): The weights, each of shape `(m, n)`.
        tier (`str`): The kernels that run here.
    """

    def __init__(self, dense: list[Tensor], tier: str) -> None:
        self.dense, self.tier = dense, tier
        self.compressed = [bitmask.compress(weight) for weight in dense]
        self.m, self.n = dense[0].shape
        self.dtype = dense[0].dtype
        self.factors = [Factors(torch.randn(RANK, self.n), 0.1 * torch.randn(self.m, 1), 2.0)]

    def sizes(self) -> dict[str, dict[str, float]]:
        """Bytes of a weight."""
        compressed = self.compressed[0]
        return {
            "dense": {"bytes": float(self.dense[0].nbytes)},
            "compressed": {"bytes": float(sum(t.nbytes for t in compressed[:3]))},
        }

    def few_tokens(self, tokens: int) -> list[Contestant]:
        """Forward passes of so many tokens."""
        x = torch.randn(tokens, self.n).to(self.dtype)
        calls: dict[str, Callable[[int], object]] = {
            "dense": lambda i: F.linear(x, self.dense[i]),
            "compressed": lambda i: bitmask_tokens.few_tokens(x, self.compressed[i], None, [], True, self.dtype),
            "dense, adapter": lambda i: by_activation.linear(x, self._scaled(self.dense[i]), None),
            "compressed, adapter": lambda i: backend.cpu.linear(x, self._scaled(self.compressed[i]), None),
        }
        # oneDNN packs bfloat16 with AVX-512 only
        has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
        if torch.backends.mkldnn.is_available() and (has_avx512 or self.dtype == torch.float32):
            packed = [prepack(weight, tokens) for weight in self.dense]
            calls["prepacked"] = lambda i: torch.ops.mkldnn._linear_pointwise(x, packed[i], None, "none", [], "")
        if self.tier != "portable":
            load(self.tier)  # with the compiler's seconds in it, a warm-up would leave one call a sample
            calls["own dense"] = lambda i: dense_tokens(x, self.dense[i], self.tier)
        if self.dtype == torch.bfloat16:
            for name, layers in other_layers(self.dense, x).items():
                calls[name] = partial(_call, layers)
        return self._in_turn(calls)

    def scaled_weights(self) -> dict[str, list[Contestant]]:
        """Making W', as a whole and in the chunks of the layer's forward pass."""
        out = torch.zeros_like(self.dense[0])

        def whole(weight: Tensor | Compressed) -> None:
            w = self._scaled(weight)
            (backend.cpu.compressed_weight if isinstance(weight, Compressed) else backend.cpu.scaled_weight)(w, out)

        def in_chunks(weight: Tensor | Compressed) -> None:
            w = self._scaled(weight)
            work = backend._elementwise(w)
            # the buffer that the products of a step are made from is there already
            work._scratch["chunk"] = out.view(-1)
            for _ in backend._scaled_chunks(work, w, by_rows=True):
                pass

        def contestants(make: Callable[[Tensor | Compressed], None]) -> list[Contestant]:
            return self._in_turn(
                {
                    "dense": lambda i: make(self.dense[i]),
                    "compressed": lambda i: make(self.compressed[i]),
                    "copy": lambda i: out.copy_(self.dense[i]),
                }
            )

        return {"w": contestants(whole), "w in chunks": contestants(in_chunks)}

    def training(self) -> list[Contestant]:
        """A forward and a backward pass of SPP, with the gradients of x and the factors."""
        x, gradient = (torch.randn(TRAINING_TOKENS, size).to(self.dtype) for size in (self.n, self.m))
        x.requires_grad_()
        factors = [Factors(A.clone().requires_grad_(), B.clone().requires_grad_(), s) for A, B, s in self.factors]
        inputs = [x, *(factor for A, B, _ in factors for factor in (A, B))]

        def step(layer: Callable[..., Tensor], weight: Tensor | Compressed) -> object:
            with torch.inference_mode(False), torch.enable_grad():
                return torch.autograd.grad(layer(x, weight, None, factors), inputs, gradient)

        return self._in_turn(
            {
                "dense": lambda i: step(spp_linear, self.dense[i]),
                "compressed": lambda i: step(compressed_linear, self.compressed[i]),
            }
        )

    def _scaled(self, weight: Tensor | Compressed) -> ScaledWeight:
        return ScaledWeight(weight, self.factors, True, self.dtype)

    def _in_turn(self, calls: dict[str, Callable[[int], object]]) -> list[Contestant]:
        # one turn for all: the next weight is the one that none of the contestants has read for the longest time
        turn = itertools.cycle(range(len(self.dense)))

        def call_next(call: Callable[[int], object]) -> None:
            call(next(turn))

        return [Contestant(name, partial(call_next, call)) for name, call in calls.items()]


def _call(layers: list[Callable[[], object]], i: int) -> object:
    return layers[i]()


def prepack(weight: Tensor, tokens: int) -> Tensor:
    """The weight in oneDNN's own layout for so many tokens, as `torch.compile` with freezing keeps it."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, tokens)
    return packed
