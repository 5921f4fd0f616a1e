# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from peft_spp.cli import app
from peft_spp.sparsity import sparsity_report

from helpers.tiny import tiny_llama


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def run(*arguments: object):
    return CliRunner().invoke(app, ["prune", *map(str, arguments)])


def test_help_is_a_table_of_contents() -> None:
    result = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "120"})
    for command in ("prune", "merge", "inspect", "compare", "demo"):
        assert command in result.output


def test_prune_writes_a_model_and_prints_a_table_or_json(tmp_path: Path, model: Path) -> None:
    arguments = ["--method", "magnitude", "--pattern", "2:4", "--exclude-modules", "o_proj"]
    result = run(model, tmp_path / "out", *arguments)
    assert result.exit_code == 0 and "18 layers" in result.stdout and result.stderr == ""
    assert "\nwith magnitude, pattern=2:4" in result.stdout
    assert "- method: magnitude\n" in (tmp_path / "out" / "README.md").read_text()
    assert sparsity_report(tmp_path / "out", modules=r".*mlp.*").all_satisfy("2:4")
    assert run(model, tmp_path / "out", *arguments).exit_code == 2
    again = run(model, tmp_path / "out", *arguments, "--overwrite", "--json")
    found = json.loads(again.stdout)
    assert found["sparsity"] == 0.5 and found["settings"]["method"] == "magnitude" and len(found["modules"]) == 18


def test_a_dry_run_says_what_would_be_pruned(tmp_path: Path, model: Path) -> None:
    result = run(model, tmp_path / "out", "--method", "magnitude", "--sparsity", "0.5", "--dry-run")
    assert result.exit_code == 0 and "Would prune" in result.stdout and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "magnitude", "--pattern", "4:2"], "4:2"),
        (["--method", "magnitude", "--sparsity", "1.5"], "1.5"),
        (["--method", "wanda", "--pattern", "2:4"], "needs calibration data"),
        (["--method", "magnitude", "--pattern", "2:4", "--target-modules", r".*\.nothing"], "nothing"),
    ],
)
def test_a_refusal_says_why_in_one_line(tmp_path: Path, model: Path, arguments: list[str], message: str) -> None:
    result = run(model, tmp_path / "out", *arguments)
    assert result.exit_code == 2 and result.stdout == ""
    assert message in result.stderr and result.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_wrong_usage_is_told_from_a_refusal(tmp_path: Path, model: Path) -> None:
    assert run(model).exit_code == 2
    assert run(model, tmp_path / "out", "--method", "obc").exit_code == 2
    assert run(model, tmp_path / "out", "--pattern", "2:4", "--samples", "0").exit_code == 2
