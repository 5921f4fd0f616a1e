# SPDX-License-Identifier: Apache-2.0
"""What `peft-spp sft`, `dpo` and the like run: training with SPP, on TRL's parser, dataclasses and trainers."""

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .checkpoints import last_complete_checkpoint

__all__ = ["last_complete_checkpoint"]


def __getattr__(name: str) -> Any:
    # imported when it is asked for: the help of the command needs only the names of the flags
    if name != "last_complete_checkpoint":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .checkpoints import last_complete_checkpoint

    return last_complete_checkpoint
