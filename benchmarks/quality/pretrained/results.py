# SPDX-License-Identifier: Apache-2.0
"""What the suite of a pretrained model found, read from its store."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..analysis import label_of
from ..design import Pruning
from ..methods import METHODS
from ..plan import contender_name
from ..store import Record, Store
from .comparison import Comparison, Entry


def comparisons_of(store: Store) -> list[Comparison]:
    """
    The comparisons of a suite's last model, as far as they are measured: in the order of the prunings, and of each the
    copies with more entries first.
    """
    newest = store.records[-1].settings["base"]
    records = [one for one in store.records if one.settings["base"] == newest]
    bases = [one for one in records if one.kind == "base"]
    before = next(one for one in bases if one.settings["pruning"] is None)
    dense = Entry("dense", (before.measured,), machine=machine_of(store, before))
    comparisons = []
    for name in dict.fromkeys(one.settings["pruning"] for one in bases if one.settings["pruning"]):
        copies = [
            Comparison(
                Pruning.of(name),
                dense,
                Entry("pruned, not tuned", (base.measured,), machine=machine_of(store, base)),
                tuple(sorted(_entries(store, records, base.settings), key=_place)),
            )
            for base in bases
            if base.settings["pruning"] == name
        ]
        copies.sort(key=lambda one: -len(one.entries))
        comparisons += [replace(one, copy=copy) for copy, one in enumerate(copies)]
    return comparisons


def _place(entry: Entry) -> tuple[int, int, int, str, bool]:
    """Where an entry stands among the others, in whatever order they were measured."""
    method, options = entry.settings["method"], entry.settings["options"]
    group = 0 if method.startswith("spp") else 1 if entry.deployed[0].get("zeros_lost") == 0 else 2
    extras = sum(name in options for name in ("teacher", "text"))
    return group, list(METHODS).index(method), extras, str(entry.settings["equal"] or ""), entry.gave_way


def machine_of(store: Store, record: Record) -> str:
    """What a record was measured on, for readers."""
    return machine_name(store.environments[record.environment])


def model_name(store: Store) -> str:
    """The model of the last run."""
    return str(store.records[-1].settings["model"])


def machines(store: Store, capability: bool = True) -> str:
    """The processors that something was measured on, and the versions of PyTorch."""
    names = [machine_name(one) if capability else one["hardware"]["cpu"] for one in store.environments]
    versions = [one["versions"]["torch"] for one in store.environments]
    return f"{', '.join(dict.fromkeys(names))}; PyTorch {', '.join(dict.fromkeys(versions))}"


def machine_name(environment: Mapping[str, Any]) -> str:
    """The processor of an environment, and the instructions that PyTorch uses of it."""
    hardware = environment["hardware"]
    return f"{hardware['cpu']} ({hardware['cpu_capability']})"


def _entries(store: Store, records: Sequence[Record], base: Mapping[str, Any]) -> list[Entry]:
    pruning, weights = base["pruning"], base.get("weights")
    groups: dict[tuple[str, float], list[Record]] = {}
    for one in records:
        if one.kind != "tune" or not one.measured["deployments"]:
            continue
        if one.settings["pruning"] == pruning and one.settings.get("weights") == weights:
            groups.setdefault((_contender(one.settings), one.settings["rate"]), []).append(one)
    entries = []
    for (key, rate), group in groups.items():
        first = group[0]
        tried = [one for one in records if one.kind == "rate" and _contender(one.settings) == key]
        rates = {
            one.settings["rate"]: one.measured["validation_loss"]
            for one in tried
            if one.settings["pruning"] == pruning
        }
        # a pruning without its own rates takes those of another
        chosen_by = rates or {one.settings["rate"]: one.measured["validation_loss"] for one in tried}
        others = {own for contender, own in groups if contender == key} - {rate}
        gave_way = any(_loss(chosen_by, other) < _loss(chosen_by, rate) for other in others)
        for deployment in first.measured["deployments"]:
            deployed = tuple(one.measured["deployments"][deployment] for one in group)
            label = label_of(first.settings, deployment) + (f", rate {rate:g}" if gave_way else "")
            machine = machine_of(store, first)
            entries.append(
                Entry(label, deployed, first.settings, first.measured, deployment, rates, machine, gave_way)
            )
    return entries


def _loss(rates: Mapping[float, float | None], rate: float) -> float:
    loss = rates.get(rate)
    return math.inf if loss is None else loss


def _contender(settings: Mapping[str, Any]) -> str:
    return f"{contender_name(settings['method'], settings['options'])} {settings['equal']}"
