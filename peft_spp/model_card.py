# SPDX-License-Identifier: Apache-2.0
"""What a saved adapter's model card says about SPP."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard

from .durable import publish, working_folder


TAG = "spp"
HEADING = "## How to load this adapter"
NOTE = f"""{HEADING}

This is an SPP adapter for a pruned model. PEFT learns the method from the package `peft-spp`; without the first line
below, loading ends in `KeyError: 'SPP'`.

```python
import peft_spp
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("<this adapter>")
model = model.merge_and_unload()  # as sparse as the base model
```
"""


def add_loading_note(folder: str | Path) -> None:
    """
    Add the note on loading, and the tag `spp`, to the model card that PEFT has written for an adapter.

    PEFT puts the card beside the `default` adapter, and one folder up for any other. Where there is none nothing is
    written; a card that has the note keeps it as it is.

    Args:
        folder (`str` or `Path`): The folder that the adapter's configuration was saved in.
    """
    path = Path(folder) / "README.md"
    if not path.exists() and not (path := Path(folder).resolve().parent / "README.md").exists():
        return
    card = ModelCard.load(path, ignore_metadata_errors=True)
    if card.data.library_name != "peft" or HEADING in card.text:
        return
    card.data.tags = sorted({*(card.data.tags or []), TAG})
    card.text = f"{card.text.rstrip()}\n\n{NOTE}"
    with working_folder(path.parent) as working:
        card.save(working / path.name)
        publish(working / path.name, path)
