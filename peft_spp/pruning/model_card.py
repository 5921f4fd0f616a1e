# SPDX-License-Identifier: Apache-2.0
"""What a pruned model's card says about the pruning."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard

from .._version import __version__
from .methods import PruningMethod
from .report import PruneReport


CARD = "README.md"
HEADING = "## Pruning"


def write_card(path: Path, report: PruneReport, method: PruningMethod, base_model: str | None) -> None:
    """
    Add what the pruning did to a model card.

    Args:
        path (`Path`): The card: that of the dense model, or nothing yet.
        report (`PruneReport`): What was done.
        method (`PruningMethod`): The method.
        base_model (`str`, *optional*): The id of the dense model on the Hub.
    """
    if path.exists():
        card = ModelCard.load(path, ignore_metadata_errors=True)
    else:
        card = ModelCard("---\nlibrary_name: transformers\n---\n")
    tags = {"sparse", "pruned", method.name.lower(), *([str(method.pattern)] if method.pattern is not None else [])}
    card.data.tags = sorted({*(card.data.tags or []), *tags})
    if base_model is not None:
        card.data.base_model = base_model
    title = card.text.strip() or f"# {Path(report.output).name}"
    card.text = f"{title}\n\n{_section(report, method, base_model)}"
    card.save(path)


def _section(report: PruneReport, method: PruningMethod, base_model: str | None) -> str:
    source = "The linear layers below" if base_model is None else f"The linear layers below of `{base_model}`"
    share = 0.0 if report.sparsity is None else report.sparsity
    lines = [
        HEADING,
        "",
        f"{source} were pruned to {method.request} with [{method.name}]({method.paper}) by peft-spp {__version__}. "
        f"{share:.2%} of their {report.numel:,} weights are zero; all other tensors are as they were.",
        "",
        *(f"- {name}: {value}" for name, value in report.settings.items() if value is not None),
        "",
        "```text",
        report.table(),
        "```",
        "",
        "To fine-tune it and keep it as sparse, use [SPP](https://arxiv.org/abs/2405.16057) (`pip install peft-spp`).",
        "",
    ]
    return "\n".join(lines)
