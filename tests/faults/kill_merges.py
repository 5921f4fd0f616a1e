# SPDX-License-Identifier: Apache-2.0
"""Kill a merge at every change of a file, and look at what is in the folder each time. Prints the counts as JSON."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections import Counter
from pathlib import Path

from peft_spp.merge import merge_checkpoint

from helpers.killing import kill_points
from helpers.merge_cases import contents, llama_case


OLD = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"old"}


def kill_merges(overwrite: bool) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as work:
        case = llama_case(Path(work), shard_size="20KB", settings={"num_hidden_layers": 1})
        sources = contents(case.base) | contents(case.adapter)
        out = Path(work, "place", "out")

        def merge() -> None:
            merge_checkpoint(case.base, case.adapter, out, overwrite=overwrite)

        def prepare() -> None:
            shutil.rmtree(out.parent, ignore_errors=True)
            if overwrite:
                out.mkdir(parents=True)
                for name, data in OLD.items():
                    (out / name).write_bytes(data)

        prepare()
        merge()
        new = contents(out)
        prepare()
        for _, name in kill_points(merge):
            outcomes[f"killed at {name}"] += 1
            found = contents(out) if out.exists() else None
            if found is None:
                # the old model may be out of its place for a moment, and is not lost
                others = [contents(path) for path in out.parent.iterdir()] if out.parent.exists() else []
                assert not overwrite or OLD in others
                outcomes["absent"] += 1
            else:
                assert found == new or (overwrite and found == OLD), found.keys()
                outcomes["new" if found == new else "old"] += 1
            assert contents(case.base) | contents(case.adapter) == sources
            prepare()
    return outcomes


def main() -> None:
    warnings.simplefilter("ignore")
    results = {f"merge over {what}": kill_merges(what == "a model") for what in ("nothing", "a model")}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
