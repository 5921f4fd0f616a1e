# SPDX-License-Identifier: Apache-2.0
"""Whether a checkpoint is the one that an adapter was trained on, and does not have the adapter in it already."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, Literal

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.merged import MERGED, is_merged, merged_adapters
from ..checkpoints.old_compressed_files import without_empty_formats
from ..sparsity.base_masks import no_record, record_checkpoint, warn_or_raise
from ..sparsity.mask_record import MaskRecord, record_rows
from .adapter import Adapter
from .parameters import AdaptedParameter
from .plan import Plan


CheckBase = Literal["warn", "error", "off"]
CHECKS = ("warn", "error", "off")


def check_base(adapter: Adapter, checkpoint: Checkpoint, check: CheckBase, plan: Plan) -> str:
    """Compare the masks of a checkpoint with those that an adapter was trained on, one tensor at a time."""
    if check == "off":
        return "not compared"
    if adapter.base is None:
        if check == "error":
            raise ValueError(no_record(f"The adapter in {adapter.folder}"))
        return "not compared, since the adapter has no record of its base model"
    conv1d = None if not adapter.config.fan_in_fan_out else _conv1d(checkpoint)
    parameters = [one for one in plan.parameters.values() if one.name in adapter.base.masks]
    of_parameters = {one.name: _record(one) for one in parameters}
    modules = {name: mask for name, mask in adapter.base.masks.items() if name not in of_parameters}
    masks = of_parameters | record_checkpoint(
        replace(adapter.base, masks=modules), checkpoint.folder, conv1d=conv1d, stored=plan.stored
    )
    mismatch = adapter.base.mismatch(masks)
    if mismatch is None:
        return f"those that the adapter was trained on, in {len(masks)} modules"
    message = (
        f"The adapter in {adapter.folder} was trained on a base model with different masks than "
        f"{checkpoint.folder}, in {mismatch}. Merge into the model that it was trained on "
        f"({adapter.config.base_model_name_or_path}), or use --check-base off (check_base='off') to merge anyway."
    )
    warn_or_raise(message, check, stacklevel=3)
    return f"different from those that the adapter was trained on, in {mismatch}"


def _record(parameter: AdaptedParameter) -> MaskRecord:
    matrices = ((rows.matrix.load(), parameter.transposed != rows.flipped) for rows in parameter.rows)
    return record_rows(parameter.shape, (one.t() if transposed else one for one, transposed in matrices))


def _conv1d(checkpoint: Checkpoint) -> bool | None:
    """A checkpoint tells the layout by its `config.json`; without one, the adapter does."""
    return None if checkpoint.config.get("model_type") else True


def check_merged_before(adapter: Adapter, checkpoint: Checkpoint) -> str:
    identity = adapter.saved.identity
    if adapter.modules and is_merged(identity, checkpoint.config):
        raise ValueError(
            f"the adapter in {adapter.folder} is already merged into {checkpoint.folder} and would be applied twice: "
            f"config.json lists its id {identity} under {MERGED!r}. Merge into the model that it was trained on "
            f"({adapter.config.base_model_name_or_path}); pass it as base (--base on the command line)"
        )
    return identity


def mark_merged(checkpoint: Checkpoint, identity: str) -> str:
    """The `config.json` of a merged model, which says that an adapter is in it."""
    kept = without_empty_formats(checkpoint.config)
    content: dict[str, Any] = {**kept, MERGED: [*merged_adapters(checkpoint.config), identity]}
    return json.dumps(content, indent=2) + "\n"
