# SPDX-License-Identifier: Apache-2.0
"""What a merged model's card says it is."""

from __future__ import annotations

from pathlib import Path

from .._version import __version__
from ..checkpoints.card import Card, without_invitation
from ..model_card import TAGS
from ..reports import percent
from .report import MergeReport


HEADING = "## Merged SPP adapter"
_OF_BASE = "## The base model"


def merged_card(base: Card, report: MergeReport, base_name: str | None, adapter_name: str | None) -> Card:
    """Make the card of a merged model out of that of its base."""
    card = Card(dict(base.data))
    card.data.setdefault("library_name", "transformers")
    card.add_tags(TAGS)
    if base_name is not None:
        card.data |= {"base_model": base_name, "base_model_relation": "finetune"}
    parts = [f"# {Path(report.output).name}", HEADING, _facts(report, base_name, adapter_name)]
    text = without_invitation(base.text).strip()
    if text:
        parts += [_OF_BASE, "From the card of the base model:", text]
    card.text = "\n\n".join(parts)
    return card


def _facts(report: MergeReport, base_name: str | None, adapter_name: str | None) -> str:
    base = "a pruned base model" if base_name is None else f"`{base_name}`"
    adapter = "An SPP adapter" if adapter_name is None else f"The SPP adapter `{adapter_name}`"
    rows = [
        f"{adapter} ([Lu et al. 2024](https://arxiv.org/abs/2405.16057)) was merged into {base} by peft-spp "
        f"{__version__}: the model is fine-tuned, and the adapter must not be merged into it again."
    ]
    if report.modules:
        share = percent(report.zeros_after / report.numel)
        rows.append(
            f"- {len(report)} modules, {report.numel:,} weights, {share} of them zero ({report.lost:,} zeros lost)"
        )
    if report.replaced:
        rows.append(f"- {len(report.replaced)} other tensors were trained")
    return "\n\n".join(rows) if len(rows) < 3 else f"{rows[0]}\n\n{rows[1]}\n{rows[2]}"
