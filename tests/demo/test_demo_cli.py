# SPDX-License-Identifier: Apache-2.0
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from peft_spp import __version__
from peft_spp.cli import app
from peft_spp.demo.output import OutputFolder
from peft_spp.installing import how_to_install


runner = CliRunner()


def test_version() -> None:
    result = runner.invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output == f"peft-spp {__version__}\n"


def test_help_lists_the_commands() -> None:
    result = runner.invoke(app, ["--help"])
    assert result.exit_code == 0
    assert "demo" in result.output
    assert "--output" in runner.invoke(app, ["demo", "--help"], env={"COLUMNS": "200"}).output


@pytest.mark.parametrize("package", ["trl", "datasets"])
def test_missing_package_names_the_extra(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    for module in list(sys.modules):
        if module.startswith("peft_spp.demo"):
            monkeypatch.delitem(sys.modules, module)
    result = runner.invoke(app, ["demo", "--output", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert f"{package} is not installed. Install it with: {how_to_install('train')}" in result.output
    assert not (tmp_path / "out").exists()


def test_a_folder_of_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "mine.txt").write_text("mine")
    result = runner.invoke(app, ["demo", "--output", str(tmp_path)], env={"COLUMNS": "300"})
    assert result.exit_code == 2
    assert "contains files that are not from the demo" in result.output
    assert [path.name for path in tmp_path.rglob("*")] == ["dense", "mine.txt"]


@pytest.mark.parametrize("name", ["dense/mine.txt", "spp-adapter/checkpoint-3/optimizer.pt", "pruned/.git/config"])
def test_what_was_added_to_an_earlier_demo_is_refused_by_name(tmp_path: Path, name: str) -> None:
    output = OutputFolder(tmp_path / "out")
    output.prepare()
    (output.root / name).parent.mkdir(parents=True)
    (output.root / name).write_text("mine")
    (output.root / name.split("/")[0] / "model.safetensors").touch()
    with pytest.raises(FileExistsError, match=name):
        output.prepare()
    assert (output.root / name).read_text() == "mine" and len(list(output.root.rglob("model.safetensors"))) == 1


def test_a_link_in_an_earlier_demo_is_not_followed(tmp_path: Path) -> None:
    output = OutputFolder(tmp_path / "out")
    output.prepare()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.safetensors").touch()
    output.dense.symlink_to(tmp_path / "mine", target_is_directory=True)
    with pytest.raises(FileExistsError, match="dense"):
        output.prepare()
    assert (tmp_path / "mine" / "model.safetensors").exists()


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(FileExistsError, match="is not a folder"):
        OutputFolder(tmp_path / "out").prepare()


def test_an_earlier_demo_is_replaced(tmp_path: Path) -> None:
    output = OutputFolder(tmp_path / "out")
    output.prepare()
    output.dense.mkdir()
    (output.dense / "model.safetensors").touch()
    output.results.touch()
    (output.root / "notes.txt").write_text("added by the user")
    output.prepare()
    assert not output.dense.exists() and not output.results.exists()
    assert (output.root / "notes.txt").exists()
