# SPDX-License-Identifier: Apache-2.0
"""The program `peft-spp` as it starts: what it imports, what it prints, and what it sets."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

import peft_spp
from peft_spp.other_libraries import quiet_imports

from helpers.tiny import prune_, tiny_llama


ROOT = Path(__file__).parents[2]
PROGRAM = """
import atexit, json, os, sys

def report():
    heavy = [name for name in ("torch", "transformers", "peft", "trl", "datasets") if name in sys.modules]
    print("\\n" + json.dumps({"heavy": heavy, "omp": os.environ.get("OMP_WAIT_POLICY")}))

atexit.register(report)
from peft_spp_command import main
main()
"""


def run(*arguments: object, **variables: str) -> tuple[dict[str, object], subprocess.CompletedProcess[str]]:
    """What the program leaves behind at its end, and what it printed."""
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    # typer looks for a shell among the parents, and a service has none: without the search the shell is an argument
    no_search = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    environment = {**inherited, **no_search, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **variables}
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1]), done


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--help"], "compress"),
        (["--version"], peft_spp.__version__),
        (["sft", "--help"], "--spp_target_modules"),
        (["grpo", "--help"], "--reward_funcs"),
        (["merge", "--help"], "--check-base"),
        (["prune", "--help"], "--damping"),
        (["--show-completion", "bash"], "_PEFT_SPP_COMPLETE"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_help_does_without_the_libraries_that_are_slow_to_import(arguments: list[str], shown: str) -> None:
    found, done = run(*arguments)
    assert done.returncode == 0 and done.stderr == "" and shown in done.stdout
    assert found["heavy"] == []


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("mer", "merge"),
        ("sft --spp_ex", "--spp_exclude_modules"),
        ("sft --learn", "--learning_rate"),
        ("dpo --be", "--beta"),
        ("prune --calib", "--calibration"),
        ("prune --damp", "--damping"),
    ],
)
def test_completion_does_without_them_too(words: str, completed: str) -> None:
    number = str(len(words.split()))
    found, done = run(_PEFT_SPP_COMPLETE="complete_bash", COMP_WORDS=f"peft-spp {words}", COMP_CWORD=number)
    assert completed in done.stdout.splitlines() and found["heavy"] == []


def test_a_command_registers_the_method_and_prints_only_its_own(tmp_path: Path) -> None:
    """Where torchao and bitsandbytes are installed, they have something to say while PEFT imports them."""
    model = tiny_llama(num_hidden_layers=1)
    prune_(model.model.layers[0].mlp.up_proj.weight, "2:4")
    model.save_pretrained(tmp_path / "model")
    found, done = run("inspect", tmp_path / "model")
    assert done.returncode == 0 and done.stderr == "" and "up_proj" in done.stdout
    assert "peft" in found["heavy"]  # type: ignore[operator]


def test_the_package_registers_in_any_other_program_and_prints_nothing() -> None:
    program = "import peft_spp, peft; print(peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType.SPP].__name__)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert (done.stdout, done.stderr) == ("SPPConfig\n", "")


def test_idle_threads_wait_passively_unless_the_user_says_otherwise() -> None:
    assert run("--version")[0]["omp"] == "passive"
    assert run("--version", OMP_WAIT_POLICY="active")[0]["omp"] == "active"


def test_only_known_lines_are_left_out_and_only_during_imports(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("torchao")
    filters = list(log.filters)
    with quiet_imports():
        log.warning("Failed to load %s", "_C_mxfp8.so")
        log.warning("the layer is not supported")
        logging.getLogger("bitsandbytes").warning("Failed to load CPU gemm_4bit_forward from kernels-community")
    log.warning("Failed to load it later")
    assert [record.getMessage() for record in caplog.records] == [
        "the layer is not supported",
        "Failed to load CPU gemm_4bit_forward from kernels-community",
        "Failed to load it later",
    ]
    assert log.filters == filters


def test_all_public_names_are_there() -> None:
    assert set(peft_spp.__all__) <= set(dir(peft_spp))
    assert all(hasattr(peft_spp, name) for name in peft_spp.__all__)
