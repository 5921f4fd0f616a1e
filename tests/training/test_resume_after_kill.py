# SPDX-License-Identifier: Apache-2.0
"""A run that was killed goes on to the weights of an unbroken one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from killed_run import RUN

from peft_spp.sft import last_complete_checkpoint
from peft_spp.sft.checkpoints import find_checkpoint
from peft_spp.sft.errors import InputError

from helpers.trl_cases import assert_equal, assert_zeros_kept, base_weights, factors, losses, make_trainer, slow


SCRIPT = Path(__file__).with_name("killed_run.py")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor], dict[int, float]]:
    """The folder of a run that nothing interrupts, its final factors, and its losses."""
    folder = tmp_path_factory.mktemp("unbroken")
    trainer = make_trainer("sft", folder, **RUN)
    trainer.train()
    return folder, factors(trainer.model), losses(trainer)


def kill_run(folder: Path, where: str) -> None:
    """Start the run of `killed_run.py` and kill it once it has come to where it waits."""
    marker = folder / "marker"
    here = Path(__file__).parent
    path = os.pathsep.join(map(str, (here.parents[1], here.parent, here, os.environ.get("PYTHONPATH", ""))))
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(folder / "out"), str(marker), where],
        env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=(folder / "stderr").open("wb"),
    )
    try:
        while not marker.exists():
            assert process.poll() is None, (folder / "stderr").read_text()[-2000:]
            time.sleep(0.2)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("where, last", [("step", 4), slow("optimizer", 2), slow("state", 2)])
def test_a_killed_run_goes_on_to_the_same_weights(
    where: str, last: int, tmp_path: Path, unbroken: tuple[Path, dict[str, torch.Tensor], dict[int, float]]
) -> None:
    kill_run(tmp_path, where)
    out = tmp_path / "out"
    assert (out / "checkpoint-4").is_dir() and not (out / "checkpoint-6").exists()
    checkpoint = last_complete_checkpoint(out)
    assert checkpoint == str(out / f"checkpoint-{last}")

    resumed = make_trainer("sft", out, **RUN)
    before = base_weights(resumed.model)
    resumed.train(resume_from_checkpoint=checkpoint)
    _, expected, expected_losses = unbroken
    assert resumed.state.global_step == 6
    assert_equal(factors(resumed.model), expected)
    assert losses(resumed) == expected_losses
    assert_zeros_kept(resumed.model, before)
    assert last_complete_checkpoint(out) == str(out / "checkpoint-6")


@pytest.mark.parametrize(
    "damage, name",
    [
        *(("missing", name) for name in ("trainer_state.json", "adapter_model.safetensors")),
        *(
            ("cut short", name)
            for name in (
                "trainer_state.json",
                "adapter_model.safetensors",
                "optimizer.pt",
                "scheduler.pt",
                "rng_state.pth",
            )
        ),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(
    damage: str, name: str, tmp_path: Path, unbroken: tuple[Path, dict[str, torch.Tensor], dict[int, float]]
) -> None:
    folder = unbroken[0]
    for step in (4, 6):
        shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    path = tmp_path / "checkpoint-6" / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    with pytest.raises(InputError, match="adapter" if name.startswith("adapter") else name):
        find_checkpoint(str(tmp_path / "checkpoint-6"), tmp_path)


def test_which_checkpoint_is_asked_for(
    tmp_path: Path, unbroken: tuple[Path, dict[str, torch.Tensor], dict[int, float]]
) -> None:
    folder = unbroken[0]
    (tmp_path / "notes").mkdir()
    (tmp_path / "checkpoint-9").touch()
    assert last_complete_checkpoint(tmp_path) is None
    assert last_complete_checkpoint(tmp_path / "absent") is None
    assert find_checkpoint(None, folder) is None and find_checkpoint("False", folder) is None
    assert find_checkpoint("auto", tmp_path) is None
    assert find_checkpoint("true", folder) == find_checkpoint("auto", folder) == str(folder / "checkpoint-6")
    assert find_checkpoint(str(folder / "checkpoint-2"), folder) == str(folder / "checkpoint-2")
    for request in ("true", str(tmp_path / "checkpoint-1"), str(tmp_path / "notes")):
        with pytest.raises(InputError, match="checkpoint"):
            find_checkpoint(request, tmp_path)


def test_of_a_folder_that_is_renamed_the_step_does_not_matter(
    tmp_path: Path, unbroken: tuple[Path, dict[str, torch.Tensor], dict[int, float]]
) -> None:
    best = shutil.copytree(unbroken[0] / "checkpoint-2", tmp_path / "best")
    assert find_checkpoint(str(best), tmp_path) == str(best)
    shutil.copytree(best, tmp_path / "checkpoint-8")  # which it is not
    assert last_complete_checkpoint(tmp_path) is None


def test_an_adapter_of_another_name_is_found_in_its_folder(
    tmp_path: Path, unbroken: tuple[Path, dict[str, torch.Tensor], dict[int, float]]
) -> None:
    checkpoint = shutil.copytree(unbroken[0] / "checkpoint-6", tmp_path / "checkpoint-6")
    (checkpoint / "mine").mkdir()
    for file in [*checkpoint.glob("adapter_*"), checkpoint / "base_masks.json"]:
        file.rename(checkpoint / "mine" / file.name)
    assert last_complete_checkpoint(tmp_path) == str(checkpoint)
    weights = checkpoint / "mine" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert last_complete_checkpoint(tmp_path) is None
    weights.unlink()
    with pytest.raises(InputError, match="its adapter 'mine' has no weights"):
        find_checkpoint(str(checkpoint), tmp_path)
