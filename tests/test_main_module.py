# SPDX-License-Identifier: Apache-2.0
"""`python -m peft_spp`: programs that load adapters without importing peft_spp."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import transformers
from peft import get_peft_model

from peft_spp import SPPConfig
from peft_spp.__main__ import main

from helpers.tiny import tiny_llama


PROGRAM = """
import json, sys
import helper_of_the_program
from peft import PeftConfig
print(json.dumps([PeftConfig.from_pretrained(sys.argv[1]).peft_type, sys.argv[2:], __name__]))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    get_peft_model(tiny_llama(), SPPConfig()).save_pretrained(tmp_path / "adapter")
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "helper_of_the_program.py").write_text("")
    (programs / "program.py").write_text(PROGRAM)
    return tmp_path


@pytest.mark.parametrize("as_module", [False, True])
def test_a_program_that_knows_nothing_of_spp_loads_an_adapter(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], as_module: bool
) -> None:
    monkeypatch.setattr(sys, "path", [str(folder / "programs") if as_module else "", *sys.path])
    monkeypatch.delitem(sys.modules, "helper_of_the_program", raising=False)
    name = "program" if as_module else str(folder / "programs" / "program.py")
    monkeypatch.setattr(sys, "argv", ["peft_spp", name, str(folder / "adapter"), "--flag", "value"])
    main()
    assert json.loads(capsys.readouterr().out) == ["SPP", ["--flag", "value"], "__main__"]


@pytest.mark.parametrize("arguments", [["missing.py"], ["no_such_module"], ["no such module"], ["prune"], []])
def test_what_does_not_exist_is_an_error(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["peft_spp", *arguments])
    with pytest.raises(SystemExit) as raised:
        main()
    assert raised.value.code != 0
    assert not arguments or arguments[0] in str(raised.value)
    assert ("`peft-spp prune`" in str(raised.value)) == (arguments == ["prune"])


def test_an_installed_command_that_is_not_a_module_is_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`transformers serve`: the package `transformers` is not a program."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", ["peft_spp", "transformers", "version"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (None, 0) and capsys.readouterr().out.strip() == transformers.__version__
