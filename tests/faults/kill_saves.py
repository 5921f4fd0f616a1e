# SPDX-License-Identifier: Apache-2.0
"""Kill a save at every change of a file, and look at what is in the folder each time. Prints the counts as JSON.

An argument, "same settings" or "other settings", picks one adapter that is saved over another.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_spp import SPPConfig
from peft_spp.tuner.saved_adapter import read_adapter

from helpers.killing import kill_points
from helpers.tiny import MLP, randomize


OLD = {"r": 3, "spp_alpha": 8}
# what is saved over it: nothing but other weights, or settings that give another meaning to weights of the same shapes
NEW = {"same settings": OLD, "other settings": {**OLD, "spp_alpha": 64}}


def model(settings: dict, adapters: tuple[str, ...]) -> PeftModel:
    adapted = get_peft_model(MLP(), SPPConfig(**settings, target_modules=["lin0", "lin1"]), adapters[0])
    for name in adapters[1:]:
        adapted.add_adapter(name, SPPConfig(**settings, target_modules=["lin0"]))
    randomize(adapted)
    return adapted


def content(folder: Path) -> tuple[object, object]:
    """The settings and the weights in the folder of an adapter; `None` for a file that is not there."""
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    settings = json.loads(config.read_text()) if config.exists() else None
    tensors = {k: v.tolist() for k, v in load_file(weights).items()} if weights.exists() else None
    return settings, tensors


def outcome(folder: Path, old: tuple, new: tuple) -> str:
    found = content(folder)
    if found == old:
        return "old"
    if found[0] is None:
        assert old == (None, None) and found[1] in (None, new[1])  # without a configuration there is no adapter
        return "absent"
    if found == new or (found[1] == new[1] and old[0] == new[0]):
        read_adapter(folder)
        return "new"
    # the new weights next to the old settings
    assert found == (old[0], new[1]), found
    try:
        read_adapter(folder)
    except ValueError as error:
        assert str(folder) in str(error)
        return "refused"
    raise AssertionError("weights were taken for those of other settings")


def kill_saves(adapters: tuple[str, ...], over: str | None) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work, "adapter")
        first, second = model(OLD, adapters), model(NEW[over] if over else OLD, adapters)
        places = ["" if name == "default" else name for name in adapters]

        def prepare() -> None:
            shutil.rmtree(folder, ignore_errors=True)
            if over:
                first.save_pretrained(folder)

        prepare()
        olds = [content(folder / place) for place in places]
        old_card = (folder / "README.md").read_text() if over else None
        second.save_pretrained(folder)
        news = [content(folder / place) for place in places]
        cards = (old_card, (folder / "README.md").read_text())
        prepare()
        for _, name in kill_points(lambda: second.save_pretrained(folder)):
            outcomes[f"killed at {name}"] += 1
            for place, old, new in zip(places, olds, news, strict=True):
                outcomes[outcome(folder / place, old, new)] += 1
            card = folder / "README.md"
            assert (card.read_text() if card.exists() else None) in cards
            prepare()
        # the save that was not killed
        second.save_pretrained(folder)
        assert [content(folder / place) for place in places] == news
        assert not [path for path in folder.rglob(".*")]
    return outcomes


def main() -> None:
    warnings.simplefilter("ignore")
    cases = [(adapters, over) for adapters in (("default",), ("default", "other")) for over in (None, *NEW)]
    if sys.argv[1:]:
        cases = [(("default",), sys.argv[1])]
    results = {}
    for adapters, over in cases:
        results[f"{len(adapters)} adapter(s) over {over or 'nothing'}"] = kill_saves(adapters, over)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
