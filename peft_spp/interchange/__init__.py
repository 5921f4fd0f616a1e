# SPDX-License-Identifier: Apache-2.0
"""SPP adapters for others, and those of others for us.

[`export_adapter`] writes an SPP adapter as one of another PEFT method that plain PEFT loads; [`convert_adapter`] reads
a checkpoint of the SPP authors' code. Both keep the function that the adapter computes.
"""

from .report import ExchangedModule, InterchangeReport
from .run import TARGETS, convert_adapter, export_adapter


__all__ = ["TARGETS", "ExchangedModule", "InterchangeReport", "convert_adapter", "export_adapter"]
