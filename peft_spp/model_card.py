# SPDX-License-Identifier: Apache-2.0
"""What an adapter's model card says about SPP, for readers and for the Hub."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import yaml  # type: ignore[import-untyped]
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import PeftModel, TaskType
from peft.mapping_func import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME

from .checkpoints.safetensors_files import read_header
from .durable import write_file
from .installing import how_to_install
from .sparsity.base_masks import BaseRecord
from .sparsity.mask_record import MaskRecord


_HEAD = re.compile(r"\.(score|classifier)(\.out_proj)?\.weight$")

CARD = "README.md"
TAGS = ("spp", "sparse")
PLACEHOLDER = "<this adapter>"
"""What stands for the adapter's place as long as nobody knows it."""
_USAGE = """## How to load this adapter

PEFT learns SPP from the package `peft-spp` ({install}). Without the first line below, loading ends in
`KeyError: 'SPP'`.

```python
import peft_spp
from peft import {auto_class}

model = {auto_class}.from_pretrained("{place}"{more})
```

## How to merge it

The merged model is as sparse as the base model, and plain Transformers loads it. {merge}

```python
model = model.merge_and_unload(safe_merge=True)
model.save_pretrained("merged-model")
```

## How to check it

```python
from peft_spp.sparsity import compare_sparsity, sparsity_report

print(sparsity_report("merged-model"))
assert compare_sparsity("path/to/base-model", "merged-model").kept  # no zero was lost
```"""

_MERGE_FROM_DISK = """From disk to disk:

```bash
peft-spp merge {place} merged-model
```

Or in Python:"""


class AdapterSettings(Protocol):
    """What a card tells of an adapter's settings; an [`SPPConfig`] has all of it."""

    base_model_name_or_path: str | None
    revision: str | None
    task_type: Any
    r: int
    spp_alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    target_modules: list[str] | set[str] | str | None
    base_record: BaseRecord | None


def why_unreadable(card: Path) -> str | None:
    """Why nobody can add to a model card."""
    try:
        ModelCard.load(card)
    except (yaml.YAMLError, ValueError) as error:
        return f"its metadata cannot be read ({type(error).__name__})"
    return None


def update_model_card(folder: str | Path, config: AdapterSettings) -> None:
    """
    Say what an SPP adapter is in the model card that PEFT has written for it.

    PEFT puts the card next to the `default` adapter, and one folder up for any other. Where there is none nothing is
    written, nor into a card that is not PEFT's. What an earlier call has written is replaced, everything else is kept.
    """
    folder = Path(folder).resolve()
    name = "default"
    path = folder / CARD
    if not path.exists():
        name, path = folder.name, folder.parent / CARD
    if not path.exists():
        return
    card = ModelCard.load(path, ignore_metadata_errors=True)
    if card.data.library_name != "peft":
        return
    masks = [] if config.base_record is None else list(config.base_record.masks.values())
    _update_metadata(card.data, config, {mask.pattern for mask in masks})
    card.text = _put(card.text, f"adapter {name}", _facts(config, name, masks))
    if name == "default" or _comment("adapter default") not in card.text:
        more = "" if name == "default" else f', subfolder="{name}"'
        more += _labels(folder, config)
        # the command takes a repository as a whole
        merge = _MERGE_FROM_DISK.format(place=PLACEHOLDER) if name == "default" else "In Python:"
        install, auto_class = how_to_install(code="`"), _auto_class(config)
        usage = _USAGE.format(install=install, auto_class=auto_class, place=PLACEHOLDER, more=more, merge=merge)
        card.text = _put(card.text, "usage", usage)
    write_file(path, card.save)


def new_model_card(base_model: str | None, task_type: str | None, tags: list[str], text: str) -> ModelCard:
    """Make a model card with the metadata that PEFT writes."""
    data = ModelCardData(
        library_name="peft",
        base_model=base_model,
        base_model_relation="adapter" if base_model else None,
        tags=tags,
        pipeline_tag="text-generation" if task_type == "CAUSAL_LM" else None,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")


def drop_local_base_model(card: ModelCard) -> None:
    """
    Take a base model that is a folder, and not a repository on the Hub, out of the metadata of a card.

    The Hub refuses such a card, and nobody else has that folder.
    """
    base_model = card.data.get("base_model")
    if not isinstance(base_model, str) or not _is_local(base_model):
        return
    card.data["base_model"] = card.data["base_model_relation"] = None
    card.data["tags"] = [tag for tag in card.data.get("tags") or [] if not tag.startswith("base_model:")]


def _is_local(base_model: str) -> bool:
    if os.path.isdir(base_model):
        return True
    try:
        validate_repo_id(base_model)
    except HFValidationError:
        return True
    return False


def _update_metadata(data: ModelCardData, config: AdapterSettings, patterns: set[str]) -> None:
    data.base_model = data.base_model or config.base_model_name_or_path
    if data.base_model:
        data["base_model_relation"] = "adapter"
    # the pattern that all adapted weights of the base model have, such as 2:4
    common = patterns - {"dense", "unstructured"} if len(patterns) == 1 else set()
    data.tags = sorted({*(data.tags or []), *TAGS, *common})


def _facts(config: AdapterSettings, name: str, masks: list[MaskRecord]) -> str:
    title = "## SPP adapter" if name == "default" else f"## SPP adapter `{name}`"
    rows = "\n".join(f"| {key} | {value} |" for key, value in _fact_rows(config, masks))
    return (
        f"{title}\n\nAn adapter for a pruned model, trained with SPP "
        "([Lu et al. 2024](https://arxiv.org/abs/2405.16057)): merging it keeps every zero.\n\n"
        f"|  |  |\n|---|---|\n{rows}"
    )


def _fact_rows(config: AdapterSettings, masks: list[MaskRecord]) -> Iterator[tuple[str, str]]:
    if config.base_model_name_or_path:
        revision = f", revision `{config.revision}`" if config.revision else ""
        yield "Base model", f"`{config.base_model_name_or_path}`{revision}"
    yield "Method", "SPP, `W' = W ⊙ (1 + s · P(A) ⊙ B)`"
    yield "Row blocks r", f"{config.r}{_pattern(config.rank_pattern)}"
    yield "Alpha", f"{config.spp_alpha:g}{_pattern(config.alpha_pattern)}, s = alpha / r"
    targets = config.target_modules
    if targets:
        listed = [targets] if isinstance(targets, str) else sorted(targets)
        yield "Target modules", ", ".join(f"`{target}`" for target in listed)
    if masks:
        numel = sum(mask.shape[0] * mask.shape[1] for mask in masks)
        zeros = sum(mask.zeros for mask in masks)
        yield "Sparsity of the base", f"{zeros / max(numel, 1):.2%} of {numel:,} weights in {len(masks)} modules"
        counts = Counter(mask.pattern for mask in masks).most_common()
        yield "Pattern of the base", ", ".join(f"{pattern} in {count} modules" for pattern, count in counts)
    if config.base_record is not None and config.base_record.quantization:
        yield "Quantization of the base", f"`{config.base_record.quantization}`"


def _pattern(pattern: Mapping[str, Any]) -> str:
    return "".join(f", {value:g} in `{key}`" for key, value in pattern.items())


def _auto_class(config: AdapterSettings) -> str:
    peft_class = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(str(config.task_type))
    return f"Auto{PeftModel.__name__ if peft_class is None else peft_class.__name__}"


def _labels(folder: Path, config: AdapterSettings) -> str:
    """How many outputs the head has, for the call that loads a classifier: Transformers makes one with two."""
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    if config.task_type not in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS) or not weights.is_file():
        return ""
    heads = [one.shape[0] for one in read_header(weights) if _HEAD.search(one.key)]
    return f", num_labels={heads[0]}" if len(heads) == 1 and heads[0] != 2 else ""


def _comment(key: str) -> str:
    return f"<!-- peft-spp: {key} -->"


def _put(text: str, key: str, content: str) -> str:
    """Put a section between two comments: in the place of the one that has the same key, or as far up as it goes."""
    start, end = _comment(key), _comment(f"end of {key}")
    block = f"{start}\n{content}\n{end}"
    present = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    if present.search(text):
        return present.sub(lambda _: block, text, count=1)
    # behind our other sections; else before the first one of PEFT's template, which is long and mostly to be filled in
    place = len(text)
    if ours := list(re.finditer(_comment("end of .*"), text)):
        place = ours[-1].end()
    elif heading := re.search("^## ", text, re.MULTILINE):
        place = heading.start()
    return "\n\n".join(filter(None, (text[:place].rstrip(), block, text[place:].strip())))
