# SPDX-License-Identifier: Apache-2.0
"""Save and merge onto a disk with more and more space left, and onto one that is read-only.

Has to run in a mount namespace of its own (`unshare -m`), as it mounts a small disk over a folder. Prints the counts
as JSON.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import tempfile
import warnings
from collections import Counter, namedtuple
from collections.abc import Callable
from pathlib import Path

from kill_saves import NEW, OLD, model

from peft_spp.merge import merge_checkpoint

from helpers.merge_cases import contents, llama_case


PAGE = 4096
SIZE = 100 * PAGE


def visible(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name != "filling"}


def fill_and_try(disk: Path, write: Callable[[], object], prepare: Callable[[], object]) -> Counter[str]:
    """Leave no page free, then one, and so on, until there is space enough."""
    outcomes: Counter[str] = Counter()
    for free in range(SIZE // PAGE):
        for path in disk.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        prepare()
        before = visible(disk)
        usage = os.statvfs(disk)
        (disk / "filling").write_bytes(b"x" * max(0, usage.f_bavail - free) * usage.f_bsize)
        try:
            write()
        except OSError as error:
            assert error.errno == errno.ENOSPC and str(disk) in str(error), error
            assert visible(disk) == before and not [path for path in disk.rglob(".*")]
            outcomes["full, and as it was"] += 1
        else:
            assert visible(disk) != before
            outcomes["enough space"] += 1
            break
    return outcomes


def read_only(disk: Path, write: Callable[[], object]) -> Counter[str]:
    before = contents(disk)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    try:
        write()
    except OSError as error:
        assert error.errno == errno.EROFS and str(disk) in str(error), error
    else:
        raise AssertionError("a read-only disk was written to")
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert contents(disk) == before
    return Counter({"read-only, and as it was": 1})


def main() -> None:
    warnings.simplefilter("ignore")
    usage = namedtuple("usage", "total used free")
    results = {}
    with tempfile.TemporaryDirectory() as work:
        disk = Path(work, "disk")
        disk.mkdir()
        first, second = model(OLD, ("default",)), model(NEW["other settings"], ("default",))
        case = llama_case(Path(work), shard_size="20KB", settings={"num_hidden_layers": 1})
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(disk)], check=True)

        def place_model() -> None:
            (disk / "out").mkdir()
            (disk / "out" / "config.json").write_text('{"model_type": "llama"}')
            (disk / "out" / "model.safetensors").write_bytes(b"old")  # without weights it is no model to replace

        def merge() -> None:
            merge_checkpoint(case.base, case.adapter, disk / "out", overwrite=True)

        try:
            results["save"] = fill_and_try(
                disk, lambda: second.save_pretrained(disk / "a"), lambda: first.save_pretrained(disk / "a")
            )
            results["save, read-only"] = read_only(disk, lambda: first.save_pretrained(disk / "a"))
            # the merge looks at the free space before it starts: here it is not told
            shutil.disk_usage = lambda _: usage(2**40, 0, 2**40)  # type: ignore[assignment]
            results["merge"] = fill_and_try(disk, merge, place_model)
            results["merge, read-only"] = read_only(disk, merge)
        finally:
            subprocess.run(["umount", str(disk)], check=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
