# SPDX-License-Identifier: Apache-2.0
"""What holds for all commands: exit codes, messages and terminals."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

import peft_spp.sparsity
from peft_spp.cli import app
from peft_spp.commands.exit_codes import CommandGroup
from peft_spp.commands.terminal import make_printable, print_text

from helpers.tiny import prune_, tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "model"
    one = tiny_llama(num_hidden_layers=1)
    prune_(one.model.layers[0].mlp.up_proj.weight, "2:4")
    one.save_pretrained(folder)
    return folder


def run(*arguments: object, charset: str = "utf-8"):
    return CliRunner(charset=charset).invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("charset", ["ascii", "cp1252", "latin-1", "shift-jis", "koi8-r"])
def test_a_terminal_without_utf8_changes_no_exit_code(model: Path, charset: str) -> None:
    """The lines of a table have no character in them."""
    result = run("compare", model, model, charset=charset)
    assert result.exit_code == 0 and "all zeros kept" in result.stdout
    table = result.stdout.splitlines()
    assert set(table[1]) <= {"-", " ", "─"} and (charset not in ("ascii", "cp1252", "latin-1") or "─" not in table[1])
    shown = run("inspect", model, charset=charset)
    assert shown.exit_code == 0 and "up_proj" in shown.stdout
    helped = run("export", "--help", charset=charset)
    assert helped.exit_code == 0 and "parameters per layer" in " ".join(helped.stdout.replace("|", " ").split())


@pytest.mark.parametrize("errors", ["strict", "backslashreplace", "surrogateescape"])
def test_the_streams_of_any_locale_can_be_written_to(errors: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`LC_ALL=POSIX PYTHONUTF8=0` makes the standard output ASCII, with `surrogateescape`."""
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="ascii", errors=errors))
    make_printable()
    print_text("─ 50 % · é \udcff")
    assert written.getvalue() == b"- 50 % * \\xe9 \\udcff\n"


def test_names_beyond_the_encoding_are_printed_escaped(model: Path, tmp_path: Path) -> None:
    place = tmp_path / "modèle-模"
    place.symlink_to(model)
    result = run("inspect", place, charset="ascii")
    assert result.exit_code == 0 and r"mod\xe8le-\u6a21" in result.stdout
    failed = run("inspect", tmp_path / "é" / "x", charset="ascii")
    assert failed.exit_code == 2 and failed.stderr.startswith("Error: ") and r"\xe9" in failed.stderr
    # bytes that are not UTF-8 are lone surrogates in Python
    broken = run("inspect", os.fsdecode(bytes(tmp_path) + b"/\xff"))
    assert broken.exit_code == 2 and r"\udcff" in broken.stderr


def ending(error: BaseException) -> CliRunner:
    """How a command ends that raises an error."""
    commands = typer.Typer(cls=CommandGroup)

    @commands.command()
    def one() -> None:
        raise error

    @commands.command()
    def other() -> None: ...

    return CliRunner().invoke(commands, ["one"])


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (ValueError("two\nlines"), 2, "Error: two lines\n"),
        (PermissionError(13, "Permission denied", "model"), 2, "Error: [Errno 13] Permission denied: 'model'\n"),
        (ImportError("not installed"), 2, "Error: not installed\n"),
        (MemoryError(), 2, "Error: MemoryError\n"),
        (torch.OutOfMemoryError("CUDA out of memory."), 2, "Error: CUDA out of memory.\n"),
        (KeyboardInterrupt(), 130, "Interrupted.\n"),
        (BrokenPipeError(32, "Broken pipe"), 2, ""),
        (typer.Exit(code=1), 1, ""),
    ],
)
def test_an_error_ends_with_its_code_and_one_line(error: BaseException, code: int, shown: str) -> None:
    result = ending(error)
    assert (result.exit_code, result.stderr, result.stdout) == (code, shown, "")


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyError("a bug"), UnboundLocalError("a bug")])
def test_an_error_nobody_expected_is_trouble_and_not_a_finding(error: Exception) -> None:
    result = ending(error)
    assert result.exit_code == 2 and "Traceback" in result.stderr and "a bug" in result.stderr


def test_a_comparison_that_fails_is_trouble(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr(peft_spp.sparsity, "compare_sparsity", fails)
    assert run("compare", model, model).exit_code == 2


_TWO = {
    "merge": lambda place, out: ("merge", place, out),
    "prune": lambda place, out: ("prune", place, out, "--method", "magnitude", "--pattern", "2:4"),
    "inspect": lambda place, out: ("inspect", place),
    "compare": lambda place, out: ("compare", place, place),
    "export": lambda place, out: ("export", place, out),
    "convert": lambda place, out: ("convert", place, out),
}


@pytest.mark.parametrize("command", _TWO)
def test_a_source_that_cannot_be_read_is_trouble_in_every_command(command: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no model")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    (tmp_path / "broken").mkdir()
    for name in ("model.safetensors", "adapter_model.safetensors"):
        (tmp_path / "broken" / name).write_bytes(b"not safetensors")
    for name in ("config.json", "adapter_config.json"):
        (tmp_path / "broken" / name).write_text("{")
    for place in ("file", "empty", "bare", "broken", "absent", "absent/below"):
        result = run(*_TWO[command](tmp_path / place, tmp_path / "out"))
        assert result.exit_code == 2 and result.stdout == "", (place, result.output)
        assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1, (place, result.stderr)
        assert place.split("/")[0] in result.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", _TWO)
@pytest.mark.parametrize(
    "place", ["./absent", "../absent/model", "~/absent", "a/b/c", "absent/", "/absent", "a model"]
)
def test_the_hub_is_not_asked_for_a_path(
    command: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft_spp.checkpoints.hub.snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    monkeypatch.chdir(tmp_path)
    result = run(*_TWO[command](place, "out"))
    assert result.exit_code == 2 and f"no folder {place!r}" in result.stderr


def test_an_empty_name_is_not_the_working_folder(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model)
    result = run("inspect", "")
    assert result.exit_code == 2 and "is empty" in result.stderr


def test_pruning_a_model_with_its_own_code_is_refused_without_a_question(model: Path, tmp_path: Path) -> None:
    custom = tmp_path / "custom"
    shutil.copytree(model, custom)
    config = json.loads((custom / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["Own"], "auto_map": {"AutoConfig": "own.Config"}}
    (custom / "config.json").write_text(json.dumps(config))
    (custom / "own.py").write_text("raise SystemExit('it was run')")
    result = run("prune", custom, tmp_path / "out", "--method", "magnitude", "--pattern", "2:4")
    assert result.exit_code == 2 and result.stdout == ""
    assert "its own code" in result.stderr and "prune_magnitude" in result.stderr


_BAD = ["(", "*.q_proj", "[a", "q_proj)", "a{2,1}"]


@pytest.mark.parametrize("expression", _BAD)
def test_an_invalid_regular_expression_is_named_with_its_option(expression: str, model: Path, tmp_path: Path) -> None:
    prune = ("prune", model, tmp_path / "out", "--method", "magnitude", "--pattern", "2:4")
    for arguments, option in (
        (("inspect", model), "--modules"),
        (("compare", model, model), "--modules"),
        (prune, "--target-modules"),
        (prune, "--exclude-modules"),
    ):
        result = run(*arguments, option, expression)
        assert result.exit_code == 2 and f"{option}: {expression!r} is not a valid regular" in result.stderr
    with pytest.raises(ValueError, match="not a valid regular expression"):
        peft_spp.sparsity.sparsity_report(model, modules=expression)


def test_an_expression_among_names_is_refused_as_it_would_match_nothing(model: Path) -> None:
    result = run("inspect", model, "--modules", "q_proj", "--modules", r".*mlp.*")
    assert result.exit_code == 2 and "(q_proj)|(.*mlp.*)" in result.stderr
    assert run("inspect", model, "--modules", "q_proj", "--modules", "mlp.up_proj").exit_code == 0


@pytest.mark.parametrize("device", ["cuda", "cuda:99", "xpu", "mps", "gpu", "meta"])
def test_a_device_that_is_not_there_is_refused_by_name(device: str, model: Path, tmp_path: Path) -> None:
    if (device == "cuda" and torch.cuda.is_available()) or (device == "mps" and torch.backends.mps.is_available()):
        pytest.skip("it is there")
    arguments = ("--method", "magnitude", "--pattern", "2:4", "--device", device)
    for dry in ((), ("--dry-run",)):
        result = run("prune", model, tmp_path / "out", *arguments, *dry)
        assert result.exit_code == 2 and f"device={device!r}" in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


_SCRIPT = """
import sys
from unittest import mock
from peft_spp.cli import app
class Report:
    def __str__(self): return "row\\n" * 1_000_000
with mock.patch("peft_spp.inspection.inspect_checkpoint", return_value=Report()):
    app(["inspect", sys.argv[1]])
"""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_closed_pipe_is_fine_and_a_full_disk_is_trouble(model: Path) -> None:
    command = [sys.executable, "-c", _SCRIPT, str(model)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "row\n"
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait() == 0 and "Traceback" not in errors and "Broken" not in errors
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("Error: [Errno 28] No space left")
