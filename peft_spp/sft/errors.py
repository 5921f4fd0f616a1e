# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations


class InputError(ValueError):
    """Arguments, data, a model or a checkpoint that cannot be used, found before training has begun."""
