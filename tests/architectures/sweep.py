# SPDX-License-Identifier: Apache-2.0
"""
SPP's default targets and merging on a tiny model of every class of Transformers.

    python tests/architectures/sweep.py [--out FILE] [MODEL_TYPE ...]

A line of JSON a model type is added to FILE; those that are there are passed over, so that a run can be resumed. With
`--write` the file becomes the table that the tests and `docs/architectures.md` go by.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import get_peft_model
from torch import nn


sys.path.insert(0, str(Path(__file__).parent.parent))

from peft_spp import SPPConfig
from peft_spp.tuner.layer import SPPLayer

from helpers import every_model
from helpers.model_inputs import floating_outputs, inputs_of
from helpers.model_sweep import main, short, write_table
from helpers.tiny import is_positive_zero, randomize


TABLE = Path(__file__).parent / "every_model.json"
PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}


class Unusable(Exception):
    """The model cannot be built or called like this, with or without an adapter."""


def check(model_type: str) -> dict[str, Any]:
    """
    What the default targets make of a model type.

    Returns:
        `dict`: `"status"`: "works", "no blocks" (nothing to adapt by default), "refused" (by PEFT, with a message that
        names the class), "unusable" (not built or not called like this), or "fault"; and the layers, or the reason.
    """
    try:
        model, run, dtype = _usable(model_type)
    except Unusable as error:
        return {"status": "unusable", "reason": str(error)}
    result: dict[str, Any] = {"class": type(model).__name__, "dtype": str(dtype).removeprefix("torch.")}
    _prune(model)
    callable_in = [mode for mode in (False, True) if _gradients(model, run, mode) is not None]
    before = _outputs(model, run)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            adapted = get_peft_model(model, SPPConfig(r=2, target_parameters=[]))
        except ValueError as error:
            no_blocks = "target_modules" in str(error) and "specify" in str(error)
            return {**result, "status": "no blocks" if no_blocks else "fault", "reason": str(error)}
        except NotImplementedError as error:  # PEFT asks the model for its embeddings, and some classes have none
            return {**result, "status": "refused", "reason": short(error)}
    left_out = [str(one.message) for one in caught if "not adapted" in str(one.message)]
    adapted.to(dtype)
    randomize(adapted)
    layers = {name: one for name, one in adapted.named_modules() if isinstance(one, SPPLayer)}
    names = {name.removeprefix("base_model.model.") for name in layers}
    result["layers"] = sorted({re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name).rpartition("*.")[2] for name in names})
    if left_out:
        result["left out"] = left_out

    learned = {mode: _learned(adapted, run, mode, layers) for mode in callable_in}
    unmerged = _outputs(adapted, run)
    zeros = {name: layer.get_base_layer().weight == 0 for name, layer in layers.items()}
    merged = adapted.merge_and_unload(safe_merge=True)
    faults = []
    if difference := _differ(unmerged, _outputs(merged, run), _TOLERANCE[dtype]):
        faults.append(f"merging changes the output: {difference}")

    # The merged model computes the same, so it uses the same layers. The base may route tokens to other experts.
    first_of = _first_names(merged)
    unused = set(names)
    for mode in callable_in:
        gradients = _gradients(merged, run, mode)
        if gradients is None:
            faults.append(f"the merged model cannot be called (training: {mode})")
            continue
        used = {name for name in names if gradients.get(first_of[name])}
        unused -= used & learned[mode]
        # Of layers that share a weight, the gradient does not tell which of them the model uses.
        learned_weights = {first_of[name] for name in learned[mode]}
        idle = sorted(name for name in used if first_of[name] not in learned_weights)
        faults += [f"no gradient (training: {mode}): {name}" for name in idle]
    if unused:
        result["unused"] = len(unused)
    if not _differ(before, unmerged, 0.0) and len(unused) < len(names):
        faults.append("the adapter has no effect")
    for name, mask in zeros.items():
        weight = merged.get_submodule(name.removeprefix("base_model.model.")).weight
        if not is_positive_zero(weight[mask]).all():
            faults.append(f"zeros lost: {name}")
    result["adapted"] = len(names)
    return {**result, "status": "fault", "faults": faults} if faults else {**result, "status": "works"}


def _usable(model_type: str) -> tuple[nn.Module, Callable[[nn.Module], list[torch.Tensor]], torch.dtype]:
    """A model, a call of it that works and gives the same twice, and the dtype that it works in."""
    errors = []
    for dtype in (torch.float64, torch.float32):
        try:
            model = every_model.build(model_type).to(dtype)
        except TimeoutError:
            raise
        except Exception as error:
            raise Unusable(f"not built: {type(error).__name__}: {short(error)}") from error
        for inputs in inputs_of(model):
            inputs = {key: t.to(dtype) if t.is_floating_point() else t for key, t in inputs.items()}

            def run(model: Any, inputs: dict[str, Any] = inputs) -> list[torch.Tensor]:
                transformers.set_seed(0)  # NumPy's as well, which some models draw the layers to skip from
                return floating_outputs(model(**inputs))

            try:
                first, second = _outputs(model, run), _outputs(model, run)
            except TimeoutError:
                raise
            except Exception as error:
                errors.append(f"{', '.join(inputs)}: {type(error).__name__}: {short(error)}")
                continue
            if not first:
                errors.append(f"{', '.join(inputs)}: no floating output")
            elif any(not t.isfinite().any() for t in first):
                errors.append(f"{', '.join(inputs)}: no finite output")
            elif _differ(first, second, 0.0):
                errors.append(f"{', '.join(inputs)}: another output each time")
            else:
                return model, run, dtype
    raise Unusable(f"not called: {errors[0] if errors else 'no known input'}")


@torch.no_grad()
def _prune(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim == 2 and not isinstance(module, nn.Embedding):
            weight.masked_fill_(torch.rand(weight.shape, generator=generator) < 0.5, 0.0)


@torch.no_grad()
def _outputs(model: nn.Module, run: Callable[[nn.Module], list[torch.Tensor]]) -> list[torch.Tensor]:
    return [t.detach().clone() for t in run(model.eval())]


def _backward(model: nn.Module, run: Callable[[nn.Module], list[torch.Tensor]], training: bool) -> None:
    outputs = [t for t in run(model.train(training)) if t.requires_grad]
    loss = sum((t * torch.arange(t.numel(), dtype=t.dtype).cos().reshape(t.shape)).nansum() for t in outputs)
    if outputs:
        loss.backward()


def _gradients(model: nn.Module, run: Any, training: bool) -> dict[str, bool] | None:
    """Which modules' weights get a gradient in the model without adapters; `None` if it cannot be called like this."""
    model.requires_grad_(True)
    try:
        _backward(model, run, training)
    except TimeoutError:
        raise
    except Exception:
        return None
    finally:
        model.eval()
    found = {
        name.removesuffix(".weight"): p.grad is not None and bool((p.grad * p).abs().sum() > 0)
        for name, p in model.named_parameters()
        if name.endswith(".weight")
    }
    model.zero_grad()
    return found


def _first_names(model: nn.Module) -> dict[str, str]:
    """For each module with a weight, the first module that has the same one."""
    first: dict[int, str] = {}
    return {
        name.removesuffix(".weight"): first.setdefault(id(p), name.removesuffix(".weight"))
        for name, p in model.named_parameters(remove_duplicate=False)
        if name.endswith(".weight")
    }


def _learned(model: nn.Module, run: Any, training: bool, layers: dict[str, Any]) -> set[str]:
    """Which adapted layers have a gradient for both factors."""
    _backward(model, run, training)
    learned = set()
    for name, layer in layers.items():
        factors = [layer.spp_A["default"].weight, layer.spp_B["default"].weight]
        if all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in factors):
            learned.add(name.removeprefix("base_model.model."))
    model.zero_grad()
    return learned


def _differ(one: list[torch.Tensor], other: list[torch.Tensor], tolerance: float) -> str:
    if [t.shape for t in one] != [t.shape for t in other]:
        return "other shapes"
    for a, b in zip(one, other, strict=True):
        a, b = a.double().nan_to_num(), b.double().nan_to_num()
        if a.numel() and (off := (a - b).abs().max().item()) > tolerance * (1 + a.abs().max().item()):
            return f"off by {off:.1e} of {a.abs().max().item():.1e}"
    return ""


def page(table: dict[str, dict[str, Any]]) -> str:
    """The documentation's page on what the sweep found."""
    by_status = {
        status: [name for name, row in table.items() if row["status"] == status]
        for status in ("works", "no blocks", "refused", "unusable", "fault")
    }
    left_out = {name: row["left out"] for name, row in table.items() if "left out" in row}
    unused = [name for name, row in table.items() if row.get("unused")]
    adapted = sum(row.get("adapted", 0) for row in table.values())
    lines = [
        "# Model classes",
        "",
        "Look up whether the default targets of SPP work for your model type. The table counts the model types of",
        f"Transformers {transformers.__version__} by result. Other models with transformer blocks follow the same",
        "rules.",
        "",
        "```python",
        "from peft import get_peft_model",
        "from peft_spp import SPPConfig",
        "from transformers import AutoModelForCausalLM",
        "",
        'model = AutoModelForCausalLM.from_pretrained("my-pruned-model", dtype="auto")',
        'model = get_peft_model(model, SPPConfig(task_type="CAUSAL_LM"))',
        "print(model.targeted_module_names)",
        "```",
        "",
        "| Result | Model types |",
        "|---|---|",
        f"| works, {adapted:,} layers in total | {len(by_status['works'])} |",
        f"| no transformer blocks with linear layers: pass `target_modules` | {len(by_status['no blocks'])} |",
        f"| refused by PEFT, with an error that names the class | {len(by_status['refused'])} |",
        "| not checked: cannot be built from its configuration alone, or called with plain inputs | "
        f"{len(by_status['unusable'])} |",
        f"| not swept yet | {len(every_model.model_types()) - len(table)} |",
        "",
        "`tests/architectures/every_model.json` lists the adapted layers of each type, and why a type was not",
        "checked.",
        "",
        "## Works",
        "",
        ", ".join(f"`{name}`" for name in by_status["works"]) + ".",
        "",
        "## Skipped layers",
        "",
        "Layers with the class of `nn.Linear` that compute something else are skipped with a warning that names them.",
        "Routers of mixtures are skipped without a warning; see [Mixtures of experts](mixtures.md#routers).",
        "",
        "| Model type | Layers |",
        "|---|---|",
        *(
            f"| `{name}` | {'; '.join(re.sub(r'.*not adapted: ', '', one) for one in left_out[name])} |"
            for name in left_out
        ),
        "",
        "## Partly checked",
        "",
        "The single forward pass of the check did not use all adapted layers of these types, for example experts that",
        "got no tokens, or image layers with text inputs:",
        ", ".join(f"`{name}`" for name in unused) + ".",
        "",
        "## No transformer blocks, or refused by PEFT",
        "",
        ", ".join(f"`{name}`" for name in (*by_status["no blocks"], *by_status["refused"])) + ".",
        "",
        "## How it was checked",
        "",
        "On a tiny random model of each type:",
        "",
        "- both factors of every adapted layer that the model uses get a gradient, in training and in evaluation;",
        "- the merged model gives the same outputs as the model with the adapter;",
        "- every zero of the base model is +0.0 in the merged one.",
        "",
        "```bash",
        "python tests/architectures/sweep.py --out sweep.jsonl --write",
        "```",
        "",
    ]
    return "\n".join(lines)


def _write(table: dict[str, dict[str, Any]]) -> None:
    write_table(TABLE, table)
    PAGE.write_text(page(table))


if __name__ == "__main__":
    main(check, seconds=120, write=_write)
