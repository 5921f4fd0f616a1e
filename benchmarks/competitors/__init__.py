# SPDX-License-Identifier: Apache-2.0
"""The methods that are compared: each takes a model and returns it adapted."""

from . import masked, peft_methods, spp_authors
from .registry import COMPETITORS, Competitor, styles_of


__all__ = [
    "COMPETITORS",
    "Competitor",
    "masked",
    "peft_methods",
    "spp_authors",
    "styles_of",
]
