# SPDX-License-Identifier: Apache-2.0
"""What a pruned model's card says about the pruning."""

from __future__ import annotations

from pathlib import Path

from .._version import __version__
from ..checkpoints.card import INVITATION, Card
from .methods import PruningMethod
from .report import PruneReport


HEADING = "## Pruning"


def pruned_card(dense: Card, report: PruneReport, method: PruningMethod, base_model: str | None) -> Card:
    """Add what the pruning did to a model card."""
    title = dense.text.strip() or f"# {Path(report.output).name}"
    card = Card(dict(dense.data), f"{title}\n\n{_section(report, method, base_model)}")
    card.data.setdefault("library_name", "transformers")
    card.add_tags({"sparse", "pruned", method.name.lower(), *([str(method.pattern)] if method.pattern else [])})
    if base_model is not None:
        card.data["base_model"] = base_model
    return card


def _section(report: PruneReport, method: PruningMethod, base_model: str | None) -> str:
    source = "The linear layers below" if base_model is None else f"The linear layers below of `{base_model}`"
    share = 0.0 if report.sparsity is None else report.sparsity
    lines = [
        HEADING,
        "",
        f"{source} were pruned to {method.request} with [{method.name}]({method.paper}) by peft-spp {__version__}. "
        f"{share:.2%} of their {report.numel:,} weights are zero; all other tensors are unchanged.",
        "",
        *(f"- {name}: {value}" for name, value in report.settings.items() if value is not None),
        "",
        "```text",
        report.table(),
        "```",
        "",
        INVITATION,
    ]
    return "\n".join(lines)
