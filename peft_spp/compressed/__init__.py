# SPDX-License-Identifier: Apache-2.0
"""Linear layers whose zeros are not stored, and how Transformers loads and saves them."""

from .layer import CompressedLinear


__all__ = ["CompressedLinear"]
