# SPDX-License-Identifier: Apache-2.0
"""
Wanda and magnitude pruning of a tiny model of every class of Transformers, against a plain computation in float64.

    python tests/pruning/pruning_sweep.py [--out FILE] [--write] [MODEL_TYPE ...]

A line of JSON a model type is added to FILE; those that are there are passed over, so that a run can be resumed. With
`--write` the file becomes the table that the tests go by.
"""

from __future__ import annotations

import copy
import re
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn


sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

from plain_wanda import SEED, plain_wanda, squared_norms, stack_of, weights_of, without_cache

from peft_spp.pruning import prune_checkpoint, prune_magnitude, prune_wanda
from peft_spp.pruning.layers import find_target_layers
from peft_spp.sparsity import sparsity_report

from helpers import every_model
from helpers.merge_cases import stored
from helpers.model_inputs import inputs_of
from helpers.model_sweep import first_sentence, main, short, write_table


TABLE = Path(__file__).parent / "every_pruned_model.json"

FROM_DISK = ("magnitude", "wanda")

Inputs = dict[str, Any]


def check(model_type: str) -> dict[str, Any]:
    """
    What pruning makes of a model type.

    Returns:
        `dict`: `"status"`: "agrees" with plain Wanda and magnitude, "refused" (by Wanda; magnitude agrees),
        "no blocks", "unusable" (not built or called) or "fault"; and how many layers, or the reason. Of mixtures,
        `"from disk"`: for each method whether it gives the bits of pruning in memory, or the reason of a refusal.
    """
    try:
        model, batches = usable(model_type)
    except (TimeoutError, KeyboardInterrupt):
        raise
    except Exception as error:
        return {"status": "unusable", "reason": f"{type(error).__name__}: {short(error)}"}
    result: dict[str, Any] = {"class": type(model).__name__}
    try:
        names = list(find_target_layers(model, None))
    except ValueError as error:
        return {**result, "status": "no blocks", "reason": short(error)}
    faults = _magnitude_faults(model, names)
    silent = silent_layers(model, names, batches)
    if silent:
        result["not reached"] = _kinds(silent)
        faults += _refusal_faults(model, batches, names)
    if len(silent) == len(names):
        return {**result, "status": "fault" if faults else "refused", "reason": "no calibration data reaches it"}

    pruned = copy.deepcopy(model)
    torch.manual_seed(SEED)
    try:
        prune_wanda(pruned, batches, pattern="2:4", exclude_modules=silent or None)
    except ValueError as error:
        if not _same(pruned, model):
            faults.append(f"changed by a refusal: {short(error)}")
        status = {"status": "fault", "faults": faults} if faults else {"status": "refused"}
        return {**result, **status, "reason": short(error)}
    names = [name for name in names if name not in silent]
    expected, actual = plain_wanda(model, names, batches), weights_of(pruned, names)
    faults += [f"wrong: {name}" for name in names if not torch.equal(expected[name], actual[name])]
    result["layers"] = len(names)
    if any(stack_of(model, name) is not None for name in names):
        result["from disk"] = {method: from_disk(model, batches, silent, method) for method in FROM_DISK}
        faults += [f"{method} from disk" for method, found in result["from disk"].items() if found == "differs"]
    return {**result, "status": "fault", "faults": faults} if faults else {**result, "status": "agrees"}


def from_disk(model: nn.Module, batches: list[Inputs], silent: list[str], method: str) -> str:
    """Whether pruning a checkpoint in bfloat16 gives the bits of pruning in memory, or why it is refused."""
    model = copy.deepcopy(model).to(torch.bfloat16)
    halves = [in_dtype(batch, torch.bfloat16) for batch in batches]
    request: dict[str, Any] = {"pattern": "2:4", "exclude_modules": silent or None}
    with tempfile.TemporaryDirectory() as folder:
        dense, out, expected = (Path(folder, name) for name in ("dense", "out", "expected"))
        try:
            model.save_pretrained(dense)
            loaded = type(model).from_pretrained(dense, dtype=torch.bfloat16)
            loaded.save_pretrained(dense)  # with the tensors that Transformers keeps in float32
            torch.manual_seed(SEED)
            prune_checkpoint(dense, out, method=method, calibration=halves, **request)
        except (ValueError, NotImplementedError) as error:
            return first_sentence(error, folder)
        torch.manual_seed(SEED)
        if method == "magnitude":
            prune_magnitude(loaded, **request)
        else:
            prune_wanda(loaded, halves, **request)
        loaded.save_pretrained(expected)
        return "agrees" if same_files(out, expected) else "differs"


def same_files(one: Path, other: Path) -> bool:
    """Whether two folders hold the same tensors, bit for bit."""
    tensors, others = stored(one), stored(other)
    return tensors.keys() == others.keys() and all(
        torch.equal(_bytes(tensor), _bytes(others[name])) for name, tensor in tensors.items()
    )


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def usable(model_type: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, list[Inputs]]:
    """A model whose weights are so large that each layer matters, and two batches that it can be called with."""
    model = every_model.build(model_type).to(dtype)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # others need float32
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter.is_floating_point():
                parameter.normal_(std=0.3, generator=generator)
    error: Exception | None = None
    for inputs in inputs_of(model):
        inputs = in_dtype(inputs, dtype)
        batches = [inputs, _other(inputs)]
        try:
            for batch in batches:
                with torch.no_grad():
                    without_cache(model)(**batch)
        except TimeoutError:
            raise
        except Exception as one:
            error = error or one
        else:
            return model, batches
    raise error or ValueError("no known input")


def silent_layers(model: nn.Module, names: list[str], batches: list[Inputs]) -> list[str]:
    """The layers that no data reaches."""
    reached = squared_norms(without_cache(model), names, batches)
    return [name for name in names if name not in reached or not reached[name].any()]


def in_dtype(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def _other(inputs: Inputs) -> Inputs:
    """Other inputs of the same shapes."""
    return {name: value if "mask" in name else value.flip(-1) for name, value in inputs.items()}


def _magnitude_faults(model: nn.Module, names: list[str]) -> list[str]:
    pruned = copy.deepcopy(model)
    prune_magnitude(pruned, pattern="2:4")
    before, after = weights_of(model, names), weights_of(pruned, names)
    wrong = []
    for name in names:
        groups = before[name].reshape(-1, 4)
        keep = torch.zeros_like(groups, dtype=torch.bool)
        keep.scatter_(1, groups.abs().argsort(dim=1, stable=True)[:, 2:], True)
        if not torch.equal(after[name], (groups * keep).reshape(before[name].shape)):
            wrong.append(f"wrong by magnitude: {name}")
    reported = {one.name for one in sparsity_report(pruned)}
    return wrong + [
        f"pruned, but not in the report: {name}"
        for name in names
        if name not in reported and (stack_of(model, name) is None or name.rpartition(".")[0] not in reported)
    ]


def _refusal_faults(model: nn.Module, batches: list[Inputs], names: list[str]) -> list[str]:
    """Layers that no data reaches have to be refused by name, or the whole model has to be, and nothing changed."""
    pruned = copy.deepcopy(model)
    try:
        prune_wanda(pruned, batches, pattern="2:4")
    except ValueError as error:
        return [] if _same(pruned, model) else [f"changed by a refusal: {short(error)}"]
    return ["pruned without data"]


def _same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)


def _kinds(names: list[str]) -> list[str]:
    return sorted({re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name).rpartition("*.")[2] for name in names})


if __name__ == "__main__":
    main(check, seconds=90, write=partial(write_table, TABLE))
