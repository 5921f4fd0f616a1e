# SPDX-License-Identifier: Apache-2.0
"""What is special to a method of training: here, what holds for all that train on the columns of their entry."""

from __future__ import annotations

from typing import Any

from .arguments import Arguments
from .methods import load
from .model import BaseModel
from .trainer import carded


class Recipe:
    """
    The checks of a method, in the order in which a run makes them, and its trainer.

    Args:
        arguments (`Arguments`): All arguments.
    """

    def __init__(self, arguments: Arguments) -> None:
        self.arguments = arguments

    def check(self) -> None:
        """Check what needs neither the model nor the data."""

    def check_model(self, model: BaseModel) -> None:
        """Check what goes with the model."""

    def check_data(self, row: dict[str, Any]) -> None:
        """Check what goes with the data, by its first row."""

    @property
    def columns(self) -> tuple[tuple[str, ...], ...]:
        """The sets of columns that can be trained on, in order of precedence; none where the data is not looked at."""
        return self.arguments.method.columns

    @property
    def needs(self) -> str:
        """The columns in words, for an error."""
        return ", or ".join(" and ".join(map(repr, names)) for names in self.columns)

    @property
    def lines(self) -> list[str]:
        """What the header of a run says in addition."""
        return []

    def trainer_class(self) -> Any:
        """The class of the trainer, or what makes one."""
        return carded(load(self.arguments.method.trainer))

    def trainer_arguments(self) -> dict[str, Any]:
        """What this trainer takes in addition to what all of TRL's take."""
        return {}

    def rehearsal_arguments(self) -> dict[str, Any]:
        """The same without what loads weights."""
        return self.trainer_arguments()
