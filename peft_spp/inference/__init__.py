# SPDX-License-Identifier: Apache-2.0
"""Running merged models: 2:4 layers packed for the sparse tensor cores of a GPU."""

from .semi_structured import SemiStructuredReport, to_semi_structured


__all__ = ["SemiStructuredReport", "to_semi_structured"]
