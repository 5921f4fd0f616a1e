# SPDX-License-Identifier: Apache-2.0
"""
Pruning and merging from disk to disk, on a tiny model of every causal language model of Transformers.

    python tests/architectures/from_disk.py [--out FILE] [--write] [MODEL_TYPE ...]

A line of JSON a model type is added to FILE; those that are there are passed over, so that a run can be resumed. With
`--write` the file becomes the table that the tests and `docs/from-disk.md` go by.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn


sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "pruning"))

from plain_wanda import SEED, stack_of, without_cache
from pruning_sweep import FROM_DISK, Inputs, from_disk, in_dtype, same_files, silent_layers, usable

from peft_spp import SPPConfig
from peft_spp.merge import merge_checkpoint
from peft_spp.pruning import prune_magnitude
from peft_spp.pruning.layers import find_target_layers
from peft_spp.sparsity import compare_sparsity

from helpers import every_model
from helpers.model_inputs import floating_outputs
from helpers.model_sweep import first_sentence, main, short, write_table
from helpers.tiny import randomize


TABLE = Path(__file__).parent / "from_disk.json"
PAGE = Path(__file__).parents[2] / "docs" / "from-disk.md"
WAYS = {"magnitude": "prune, magnitude", "wanda": "prune, Wanda", "merge": "merge"}


def check(model_type: str) -> dict[str, Any]:
    """
    What the ways from disk to disk make of a model type.

    Returns:
        `dict`: `"status"`: "checked", "unusable" (not built or called; with the reason), "no blocks", or "fault". For
        each way, "agrees" with the one in memory, or the reason of a refusal; a fault if a bit differs.
    """
    try:
        model, batches = _usable(model_type)
    except TimeoutError:
        raise
    except Exception as error:
        return {"status": "unusable", "reason": f"{type(error).__name__}: {short(error)}"}
    result: dict[str, Any] = {"class": type(model).__name__}
    try:
        names = list(find_target_layers(model, None))
    except ValueError as error:
        return {**result, "status": "no blocks", "reason": short(error)}
    if any(stack_of(model, name) is not None for name in names):
        result["mixture"] = True
    silent = silent_layers(model, names, batches)
    for method in FROM_DISK:
        result[method] = from_disk(model, batches, silent if method == "wanda" else [], method)
    result["merge"] = _merge(model, batches[0])
    faults = [way for way in WAYS if result[way].startswith("differs")]
    return {**result, "status": "fault", "faults": faults} if faults else {**result, "status": "checked"}


def _usable(model_type: str) -> tuple[nn.Module, list[Inputs]]:
    """A model that can be called, in float64 or else in float32, which some classes insist on."""
    try:
        return usable(model_type)
    except RuntimeError:
        return usable(model_type, torch.float32)


def _merge(model: nn.Module, inputs: Inputs) -> str:
    """
    Whether merging a checkpoint in bfloat16 gives the bits of `merge_and_unload`, or why it is refused.

    The merged checkpoint has to load in Transformers without a missing or unexpected tensor, to compute what the model
    that was merged in memory computes, and to have all zeros of its base.
    """
    model = copy.deepcopy(model).to(torch.bfloat16)
    prune_magnitude(model, pattern="2:4")
    with tempfile.TemporaryDirectory() as folder:
        base, adapter, out, expected = (Path(folder, name) for name in ("base", "adapter", "out", "expected"))
        try:
            model.save_pretrained(base)
            _load(type(model), base).save_pretrained(base)  # with the tensors that Transformers keeps in float32
            adapted = get_peft_model(_load(type(model), base), SPPConfig(r=2, target_parameters=[]))
            randomize(adapted)
            adapted.save_pretrained(adapter)
            merge_checkpoint(base, adapter, out, check_base="error")
        except (ValueError, NotImplementedError) as error:
            return first_sentence(error, folder)
        merged = PeftModel.from_pretrained(_load(type(model), base), adapter).merge_and_unload(safe_merge=True)
        merged.save_pretrained(expected)
        loaded, report = type(model).from_pretrained(out, dtype=torch.bfloat16, output_loading_info=True)
        wrong = [key for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[key]]
        if not same_files(out, expected):
            wrong.append("other bits than merge_and_unload")
        if not compare_sparsity(base, out).kept:
            wrong.append("zeros lost")
        if not _same_outputs(loaded, merged, inputs):
            wrong.append("other outputs than merge_and_unload")
    return f"differs: {', '.join(wrong)}" if wrong else "agrees"


def _load(cls: Any, folder: Path) -> Any:
    return cls.from_pretrained(folder, dtype=torch.bfloat16)


def _same_outputs(one: nn.Module, other: nn.Module, inputs: Inputs) -> bool:
    outputs = []
    for model in (one, other):
        torch.manual_seed(SEED)
        with torch.no_grad():  # in float32: some classes do not compute in bfloat16
            outputs.append(floating_outputs(without_cache(model).float()(**in_dtype(inputs, torch.float32))))
    return len(outputs[0]) == len(outputs[1]) > 0 and all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(*outputs, strict=True)
    )


def page(table: dict[str, dict[str, Any]]) -> str:
    """The documentation's page on what the sweep found."""
    checked = {name: row for name, row in table.items() if row["status"] == "checked"}
    others = {name: row for name, row in table.items() if name not in checked}
    refused = {name: row for name, row in checked.items() if any(row[way] != "agrees" for way in WAYS)}
    agreeing = [name for name in checked if name not in refused]
    mixtures = [name for name, row in checked.items() if row.get("mixture")]
    lines = [
        "# From disk to disk, by architecture",
        "",
        "Look up whether `peft-spp prune` and `peft-spp merge` work for your model type without loading the model.",
        f"The table counts the causal language models of Transformers {transformers.__version__}; a tiny model of",
        "each was pruned and merged from disk and in memory.",
        "",
        "```bash",
        "peft-spp prune my-dense-model my-pruned-model --method magnitude --pattern 2:4",
        "```",
        "",
        "| From disk to disk | same bits as in memory | refused, with the reason below |",
        "|---|---|---|",
        *(
            f"| {title} | {sum(row[way] == 'agrees' for row in checked.values())} | "
            f"{sum(row[way] != 'agrees' for row in checked.values())} |"
            for way, title in WAYS.items()
        ),
        "",
        f"{len(others)} of the {len(table)} model types were not checked, because no tiny model of them can be built",
        f"or called. {len(mixtures)} of the checked ones are mixtures: they are pruned with their experts, and the",
        "merged adapters are those of their linear layers.",
        "",
        "## All three agree",
        "",
        ", ".join(f"`{name}`" for name in agreeing) + ".",
        "",
        "## Refused",
        "",
        "A refusal names the model or the tensor and what to do instead, and writes nothing.",
        "",
        "| Model type | prune, magnitude | prune, Wanda | merge |",
        "|---|---|---|---|",
        *(f"| `{name}` | {' | '.join(_cell(row[way]) for way in WAYS)} |" for name, row in refused.items()),
        "",
        "## Not checked",
        "",
        "| Model type | Why |",
        "|---|---|",
        *(f"| `{name}` | {_cell(row['reason'])} |" for name, row in others.items()),
        "",
        "## How it was checked",
        "",
        "On a tiny random model of each type in bfloat16:",
        "",
        "- pruning the checkpoint gives the bits of pruning the loaded model and saving it, for magnitude and Wanda",
        "  at 2:4;",
        "- merging a random adapter into the pruned checkpoint gives the bits of `merge_and_unload` and",
        "  `save_pretrained`;",
        "- the merged checkpoint loads in Transformers without missing or unexpected tensors, computes the same as",
        "  the model that was merged in memory, and has all zeros of its base.",
        "",
        "[Model classes](architectures.md) has the default targets of all architectures, not only causal ones.",
        "",
        "```bash",
        "python tests/architectures/from_disk.py --out from_disk.jsonl --write",
        "```",
        "",
    ]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _write(table: dict[str, dict[str, Any]]) -> None:
    write_table(TABLE, table)
    PAGE.write_text(page(table))


if __name__ == "__main__":
    main(check, seconds=180, write=_write, model_types=every_model.causal_model_types())
