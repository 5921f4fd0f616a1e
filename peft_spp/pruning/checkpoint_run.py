# SPDX-License-Identifier: Apache-2.0
"""Pruning the layers of a checkpoint one after another, and writing them into a copy of its files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.conversion import Origin
from ..checkpoints.tensor_file import StoredTensor
from ..sparsity import NMPattern
from ..sparsity.counting import Counts, count
from .by_block import layers_of_block, prune_block, warn_of_rarely_reached
from .calibration import check_repeatable
from .calibration_data import CalibrationInputs
from .calibration_mode import calibration_mode
from .dense_run import check_reached, enter_checkpoint
from .experts import Expert
from .layers import PrunableLayer, is_stored_inputs_first, weight_name
from .methods import PruningMethod
from .preflight import check_finite, last_block, needed_tensors
from .report import PrunedModule
from .skeleton import INSTEAD, Skeleton


Progress = Callable[[int, int], object]
"""Called with the steps done and the steps there are."""


@dataclass
class CheckpointRun:
    """Prunes layer by layer or block by block, and tells how far it is."""

    method: PruningMethod
    skeleton: Skeleton  # the model
    layers: dict[str, PrunableLayer]  # its layers to prune
    progress: Progress | None  # called after each step
    modules: dict[str, PrunedModule] = field(default_factory=dict)  # what was done so far
    _done: int = 0
    _total: int = 0

    def look(self, data: list[CalibrationInputs], steps_to_come: int) -> None:
        """Check the tensors and the dense model, and change nothing: what is found cannot end the run half-way."""
        others = needed_tensors(self.skeleton, self.layers, self.method)
        blocks = last_block(self.skeleton, self.layers) + 1 if data else 0
        self._total = len(self.layers) + len(others) + blocks + steps_to_come
        for tensor in others:
            check_finite(tensor)
            self._step()
        for origin, names in self._one_by_one(self.layers):
            self._check_reversible(origin)
            for name in names:
                self._record(name, self._count(name), None)
        if data:
            check_reached(self.skeleton, self.layers, data, self._step)

    def steps(self, batches: int) -> int:
        """How many steps pruning will take."""
        if self.method.statistics is None:
            return len(self.layers)
        last = last_block(self.skeleton, self.layers)
        by_block = [layers_of_block(self.layers, self.skeleton.blocks_name, index) for index in range(last + 1)]
        return batches * (1 + sum(2 if layers else 1 for layers in by_block))

    def prune(self, data: list[CalibrationInputs], copies: Mapping[Path, Path]) -> None:
        """Prune the layers, and write them into copies of the weight files."""
        if self.method.statistics is not None:
            self._prune_by_block(data, copies)
            return
        for origin, names in self._one_by_one(self.layers):
            for name in names:
                self.method.prune(name, self.layers[name], None)
            self._finish(origin, names, copies)

    def _by_origin(self, names: Iterable[str]) -> list[tuple[Origin, list[str]]]:
        """Layers that are stored together, such as the experts of a stack, together."""
        found: dict[int, tuple[Origin, list[str]]] = {}
        for name in names:
            origin = self._origin(name)
            found.setdefault(id(origin), (origin, []))[1].append(name)
        return list(found.values())

    def _one_by_one(self, names: Iterable[str]) -> Iterator[tuple[Origin, list[str]]]:
        """The layers that are stored together, while their weights are in memory."""
        for origin, together in self._by_origin(names):
            with self.skeleton.loaded(origin.shapes):
                yield origin, together
            for _ in together:
                self._step()

    def _prune_by_block(self, data: list[CalibrationInputs], copies: Mapping[Path, Path]) -> None:
        skeleton, blocks = self.skeleton, self.skeleton.blocks
        by_block = [layers_of_block(self.layers, skeleton.blocks_name, index) for index in range(len(blocks))]
        last = last_block(skeleton, self.layers)
        with calibration_mode(skeleton.model):
            batches = enter_checkpoint(skeleton, data, self._step)
            rarely_reached: list[str] = []
            for index in range(last + 1):
                with skeleton.loaded(skeleton.names_of_block(index)):
                    layers = by_block[index]
                    check_repeatable(index, blocks[index], batches[0])
                    rarely_reached += prune_block(self.method, index, blocks[index], layers, batches, self._step)
                    for origin, names in self._by_origin(layers):
                        self._finish(origin, names, copies)
        warn_of_rarely_reached(rarely_reached, self.layers)

    def _step(self) -> None:
        self._done += 1
        if self.progress is not None:
            self.progress(self._done, self._total)

    def _count(self, name: str) -> int:
        """The zeros of a weight that is in memory, and finite."""
        counts = self._counts(name)
        if counts.non_finite:
            stored = self._stored(name)[0]
            raise ValueError(
                f"tensor {stored.name!r} of {stored.file} contains {counts.non_finite} NaN or infinite values: the "
                "model is broken"
            )
        return counts.zeros

    def _check_reversible(self, origin: Origin) -> None:
        try:
            origin.check_reversible(self._parameters(origin))
        except ValueError as error:
            raise ValueError(f"{self.skeleton.checkpoint.folder}: {error}. {INSTEAD}") from error

    def _parameters(self, origin: Origin) -> dict[str, Tensor]:
        return {name: self.skeleton.model.get_parameter(name).detach().cpu() for name in origin.shapes}

    def _finish(self, origin: Origin, names: Iterable[str], copies: Mapping[Path, Path]) -> None:
        """Check what layers that are stored together have become, and write them."""
        for name in names:
            self._check(name)
        for stored, value in origin.stored(self._parameters(origin)):
            data = value.contiguous().view(torch.uint8)
            with copies[stored.file].open("r+b") as file:
                file.seek(stored.start)
                file.write(data.numpy().data)

    def _check(self, name: str) -> None:
        counts = self._counts(name)
        pattern = None if self.method.pattern is None else NMPattern.parse(self.method.pattern)
        if counts.non_finite or (pattern is not None and counts.fullest[pattern.m] > pattern.n):
            raise ValueError(
                f"{name} is not {self.method.request} after pruning: this is a bug in peft_spp, please report it"
            )
        self._record(name, self.modules[name].zeros_before, counts.zeros)

    def _counts(self, name: str) -> Counts:
        layer = self.layers[name]
        sizes = [] if self.method.pattern is None else [NMPattern.parse(self.method.pattern).m]
        return count(layer.weight, transposed=is_stored_inputs_first(layer), group_sizes=sizes)

    def _origin(self, name: str) -> Origin:
        return self.skeleton.origin(weight_name(name, self.layers[name]))

    def _stored(self, name: str) -> list[StoredTensor]:
        """The stored tensors that hold the weight of a layer."""
        layer, origin = self.layers[name], self._origin(name)
        return origin.tensors_of_expert(layer.index, len(layer.stack)) if isinstance(layer, Expert) else origin.tensors

    def _record(self, name: str, before: int, after: int | None) -> None:
        stored, folder = self._stored(name), self.skeleton.checkpoint.folder
        weight = self.layers[name].weight
        self.modules[name] = PrunedModule(
            name=name,
            tensor=", ".join(one.name for one in stored),
            file=", ".join(dict.fromkeys(one.file.relative_to(folder).as_posix() for one in stored)),
            shape=tuple(weight.shape),
            dtype=str(weight.dtype).removeprefix("torch."),
            zeros_before=before,
            zeros_after=after,
        )
