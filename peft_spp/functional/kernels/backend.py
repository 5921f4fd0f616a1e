# SPDX-License-Identifier: Apache-2.0
"""What the kernels of a device have to offer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..bitmask import Compressed
from ..factors import Factors
from . import by_activation
from .scaled import ScaledWeight


class KernelBackend(ABC):
    """
    The kernels of one kind of device. `composite` serves where there is none.

    A backend needs the first two methods; the layer follows from them, by way of its weight: one matmul forward and
    two backward.
    """

    @abstractmethod
    def scaled_weight(self, w: ScaledWeight, out: torch.Tensor | None = None) -> torch.Tensor:
        """
        W' as a whole; see [`peft_spp.functional.scaled_weight`].

        Args:
            w ([`ScaledWeight`]): What to compute. W is dense, with any strides, and there are factors.
            out (`torch.Tensor`, *optional*): Where to write it, of the dtype of W'; it may be W itself.

        Returns:
            `torch.Tensor`: `out`, or a new tensor in the memory layout of W.
        """

    @abstractmethod
    def factor_gradients(
        self, product: torch.Tensor, weight: torch.Tensor, factors: Sequence[Factors]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """
        The gradients of A and B of each adapter, given gyᵀ x, the gradient of W'.

        With S = (gyᵀ x) ⊙ W they are `gA[k] = s · Σ_{i in block k} B[i] S[i]` and `gB[i] = s · S[i] · P(A)[i]`, summed
        in float32 (float64 if any input is float64).

        Args:
            product (`torch.Tensor`): gyᵀ x, shape `(m, n)`, best in the memory layout of the weight.
            weight (`torch.Tensor`): W, shape `(m, n)`, any strides.
            factors (`Sequence[Factors]`): The factors of each adapter.

        Returns:
            `list[tuple[torch.Tensor, torch.Tensor]]`: The gradients of A and B, in their shapes and dtypes.
        """

    def linear(
        self, x: torch.Tensor, w: ScaledWeight, bias: torch.Tensor | None, overwrite: bool = False
    ) -> torch.Tensor:
        """
        `x @ W'.T + bias`, the cheaper way.

        Args:
            x (`torch.Tensor`): The input, shape `(*, n)`.
            w ([`ScaledWeight`]): The weight.
            bias (`torch.Tensor`, *optional*): shape `(m,)`.
            overwrite (`bool`): Whether W' may be written over W.

        Returns:
            `torch.Tensor`: shape `(*, m)`, in the dtype of W'.
        """
        if isinstance(w.weight, Compressed):
            return self.compressed_linear(x, w, bias)
        tokens = x.numel() // max(w.weight.shape[1], 1)
        if w.factors and by_activation.is_cheaper(tokens, w):
            return by_activation.linear(x, w, bias)
        return self.linear_by_weight(x, w, bias, overwrite)

    def linear_by_weight(
        self, x: torch.Tensor, w: ScaledWeight, bias: torch.Tensor | None, overwrite: bool = False
    ) -> torch.Tensor:
        """[`linear`] with a dense W, by way of W'."""
        effective = self._effective(w, overwrite)
        y = F.linear(x.to(w.dtype).reshape(-1, x.shape[-1]), effective, None if bias is None else bias.to(w.dtype))
        # not a view: autograd forbids changing a view that a Function returns in place, as some models do
        result: torch.Tensor = torch.ops.aten._unsafe_view(y, (*x.shape[:-1], effective.shape[0]))
        return result

    def compressed_weight(self, w: ScaledWeight, out: torch.Tensor | None = None) -> torch.Tensor:
        """[`scaled_weight`] with a compressed W, which may have no factors; in `out` or a contiguous tensor."""
        effective = self._effective(w.expanded(), overwrite=True)
        return effective if out is None else out.copy_(effective)

    def compressed_linear(self, x: torch.Tensor, w: ScaledWeight, bias: torch.Tensor | None) -> torch.Tensor:
        """[`linear`] with a compressed W."""
        return self.linear(x, w.expanded(), bias, overwrite=True)

    def linear_backward(
        self,
        grad_y: torch.Tensor,
        x: torch.Tensor,
        w: ScaledWeight,
        needs_x: bool,
        needs_factors: bool,
        overwrite: bool = False,
    ) -> list[torch.Tensor]:
        """
        The gradients of [`linear`] that are needed: of x, and then of A and B of each adapter.

        Args:
            grad_y (`torch.Tensor`): The gradient of the output.
            x (`torch.Tensor`): The input.
            w ([`ScaledWeight`]): The weight.
            needs_x (`bool`): Whether x needs one.
            needs_factors (`bool`): Whether the factors do.
            overwrite (`bool`): Whether W' may be written over W.

        Returns:
            `list[torch.Tensor]`: The gradients, in the dtypes of the inputs.
        """
        if isinstance(w.weight, Compressed):
            w, overwrite = w.expanded(), True
        # one m×n tensor next to the weight at a time: first gyᵀx and then W', which may take the weight's place
        grads = self._factor_gradients(grad_y, x, w) if needs_factors else []
        if needs_x:
            grads.insert(0, torch.matmul(grad_y, self._effective(w, overwrite)).to(x.dtype))
        return grads

    def _factor_gradients(self, grad_y: torch.Tensor, x: torch.Tensor, w: ScaledWeight) -> list[torch.Tensor]:
        weight = w.dense
        m, n = weight.shape
        x2d, grad_y2d = x.reshape(-1, n).to(w.dtype), grad_y.reshape(-1, m)
        # in the memory layout of the weight, so that the pass over both walks them alike
        transposed = weight.stride(0) < weight.stride(1)
        product = (x2d.t() @ grad_y2d).t() if transposed else grad_y2d.t() @ x2d
        return [grad for pair in self.factor_gradients(product, weight, w.factors) for grad in pair]

    def _effective(self, w: ScaledWeight, overwrite: bool) -> torch.Tensor:
        if not w.factors:
            return w.dense.to(w.dtype)
        return self.scaled_weight(w, out=w.dense if overwrite and w.dense.dtype == w.dtype else None)
