# SPDX-License-Identifier: Apache-2.0
"""Nothing is lost if a process is killed, the disk is full or read-only, or two processes write to one folder."""

import contextlib
import errno
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_spp import SPPConfig
from peft_spp.checkpoints.compressed_files import read_metadata
from peft_spp.checkpoints.safetensors_files import read_header
from peft_spp.merge import merge_checkpoint
from peft_spp.text_files import find_fault
from peft_spp.tuner.adapter_files import list_tensors
from peft_spp.tuner.saved_adapter import read_adapter

from helpers.killing import IS_SUPPORTED
from helpers.tiny import MLP


HERE = Path(__file__).parent
FOLDERS = [str(HERE), str(HERE.parent)]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": os.pathsep.join([*FOLDERS, *filter(None, [os.environ.get("PYTHONPATH")])]),
}

needs_tracing = pytest.mark.skipif(not IS_SUPPORTED, reason="traces system calls of Linux on x86-64")


def run(script: str, *arguments: str, command: tuple[str, ...] = ()) -> dict[str, dict[str, int]]:
    done = subprocess.run(
        [*command, sys.executable, str(HERE / script), *arguments], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    # the last line: DeepSpeed, where it is installed, writes to the standard output when it is imported
    return json.loads(done.stdout.splitlines()[-1])


def killed(counts: dict[str, int]) -> int:
    return sum(count for name, count in counts.items() if name.startswith("killed at"))


@needs_tracing
def test_a_save_killed_at_any_point_leaves_the_old_adapter_or_the_new_or_is_refused():
    (counts,) = run("kill_saves.py", "other settings").values()
    assert killed(counts) > 30 and counts["old"] and counts["new"] and counts["refused"]
    assert counts["old"] + counts["new"] + counts["refused"] == killed(counts)


@needs_tracing
@pytest.mark.slow
def test_a_save_killed_at_any_point_in_any_case():
    results = run("kill_saves.py")
    print(json.dumps(results))
    for what, counts in results.items():
        # with the same settings the weights of either save belong to them
        assert ("refused" in counts) == ("other settings" in what)
        assert ("absent" in counts) == ("over nothing" in what)
        assert killed(counts) > 30 and counts["old"] and counts["new"]


@needs_tracing
@pytest.mark.slow
def test_a_merge_killed_at_any_point_leaves_a_whole_model_or_none():
    results = run("kill_merges.py")
    print(json.dumps(results))
    assert all(killed(counts) > 30 and counts["new"] for counts in results.values())


def may_mount() -> bool:
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return False
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", tempfile.gettempdir()]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not may_mount(), reason="needs the right to mount a small disk")
def test_a_full_or_a_read_only_disk_leaves_what_was_there():
    results = run("full_disk.py", command=("unshare", "-m"))
    print(json.dumps(results))
    assert results["save"]["full, and as it was"] > 1 and results["merge"]["full, and as it was"] > 1
    assert results["save, read-only"] == results["merge, read-only"] == {"read-only, and as it was": 1}


@pytest.fixture
def public_folder():
    """A folder whose parents any user may enter."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@contextlib.contextmanager
def without_privileges():
    """Permissions count for nobody who is root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_folder_that_may_not_be_written_to_is_named_and_left_alone(public_folder):
    from kill_saves import OLD, content, model

    folder = public_folder / "adapter"
    model(OLD, ("default",)).save_pretrained(folder)
    second, before = model({**OLD, "spp_alpha": 64}, ("default",)), content(folder)
    folder.chmod(0o555)
    with without_privileges(), pytest.raises(PermissionError, match=str(folder)):
        second.save_pretrained(folder)
    folder.chmod(0o755)
    assert content(folder) == before and not list(folder.glob(".*"))


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_file_that_may_not_be_read_is_neither_missing_nor_damaged(public_folder):
    """`safetensors` reports one as missing."""
    weights, texts = public_folder / "adapter_model.safetensors", public_folder / "texts.jsonl"
    save_file({"a": torch.zeros(2)}, weights)
    texts.write_text("{}\n")
    for file in (weights, texts):
        file.chmod(0)
    with without_privileges():
        for read in (read_header, read_metadata, lambda file: list_tensors(file, pickled=False)):
            with pytest.raises(PermissionError):
                read(weights)
        assert "cannot be read: [Errno 13] Permission denied" in str(find_fault(texts))


@contextlib.contextmanager
def file_size_limit(size: int):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
def test_a_file_size_limit_leaves_the_old_adapter(tmp_path):
    from kill_saves import OLD, content, model

    folder = tmp_path / "adapter"
    model(OLD, ("default",)).save_pretrained(folder)
    second, before = model({**OLD, "spp_alpha": 64}, ("default",)), content(folder)
    for size in (0, 100, 500, 1000, 2000):
        with file_size_limit(size), pytest.raises(OSError, match=str(folder)) as error:
            second.save_pretrained(folder)
        assert error.value.errno == errno.EFBIG
        assert content(folder) == before and not list(folder.glob(".*"))


def _save_many_times(folder: str, alpha: int, times: int) -> None:
    from kill_saves import model

    adapted = model({"r": 3, "spp_alpha": alpha}, ("default",))
    for _ in range(times):
        adapted.save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes_that_save_into_one_folder_leave_one_adapter_or_one_that_is_refused(tmp_path):
    context = multiprocessing.get_context("fork")
    folder, refused = tmp_path / "adapter", 0
    for _ in range(20):
        processes = [context.Process(target=_save_many_times, args=(folder, alpha, 3)) for alpha in (8, 64)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            assert process.exitcode == 0
        try:
            read_adapter(folder)
        except ValueError:
            refused += 1
        assert load_file(folder / "adapter_model.safetensors") and not list(folder.glob(".*"))
    print(f"{refused} of 20 refused")


def _merge(base: Path, adapter: Path, out: Path) -> None:
    with contextlib.suppress(FileExistsError):
        merge_checkpoint(base, adapter, out, overwrite=True)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes_that_merge_into_one_folder_leave_one_whole_model(tmp_path):
    from helpers.merge_cases import contents, llama_case

    cases = [llama_case(tmp_path / str(r), SPPConfig(r=r, task_type="CAUSAL_LM"), shard_size="20KB") for r in (3, 5)]
    merged = []
    for number, case in enumerate(cases):
        alone = tmp_path / f"merged{number}" / "out"  # the card names the folder
        merge_checkpoint(case.base, case.adapter, alone)
        merged.append(contents(alone))
    context, out = multiprocessing.get_context("fork"), tmp_path / "place" / "out"
    for _ in range(10):
        processes = [context.Process(target=_merge, args=(case.base, case.adapter, out)) for case in cases]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            assert process.exitcode == 0
        assert contents(out) in merged and [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_adapter_is_saved_by_the_wrapped_method_alone_and_other_methods_by_peft(tmp_path):
    from peft import LoraConfig, get_peft_model

    get_peft_model(MLP(), LoraConfig(target_modules=["lin0"])).save_pretrained(tmp_path / "lora")
    assert "weights_id" not in json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    get_peft_model(MLP(), SPPConfig(target_modules=["lin0"])).save_pretrained(tmp_path / "spp")
    assert json.loads((tmp_path / "spp" / "adapter_config.json").read_text())["weights_id"]
    lora = {path.name for path in (tmp_path / "lora").iterdir()}
    assert {path.name for path in (tmp_path / "spp").iterdir()} == lora | {"base_masks.json"}
