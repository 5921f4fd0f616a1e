# SPDX-License-Identifier: Apache-2.0
import json
import shutil

import pytest
from typer.testing import CliRunner

from peft_spp.cli import app

from helpers.merge_cases import assert_same_bits, contents, edit_json, llama_case, merged_by_peft, stored


@pytest.fixture
def case(tmp_path):
    return llama_case(tmp_path)


def merge(*arguments):
    return CliRunner().invoke(app, ["merge", *map(str, arguments)])


def test_merge_writes_the_model_and_prints_a_table(tmp_path, case):
    result = merge(case.adapter, tmp_path / "out")
    assert result.exit_code == 0 and "down_proj" in result.stdout and result.stderr == ""
    assert_same_bits(stored(tmp_path / "out"), stored(merged_by_peft(case, tmp_path / "peft")))


def test_adapters_in_subfolders_are_named_and_not_merged(tmp_path, case):
    shutil.copytree(case.adapter, tmp_path / "second")
    (tmp_path / "second").rename(case.adapter / "second")
    with pytest.warns(UserWarning, match=f"not those in its subfolders: second. .* such as {case.adapter / 'second'}"):
        merge(case.adapter, tmp_path / "out")
    assert_same_bits(stored(tmp_path / "out"), stored(merged_by_peft(case, tmp_path / "peft")))


def test_merge_prints_json(tmp_path, case):
    result = merge(case.adapter, tmp_path / "out", "--json", "--dry-run", "--base", case.base)
    report = json.loads(result.stdout)
    assert result.exit_code == 0 and report["dry_run"] and report["lost"] == 0 and len(report["modules"]) == 21
    assert not (tmp_path / "out").exists()


def test_merge_overwrites_if_asked(tmp_path, case):
    assert merge(case.adapter, tmp_path / "out").exit_code == 0
    assert merge(case.adapter, tmp_path / "out").exit_code == 2
    assert merge(case.adapter, tmp_path / "out", "--overwrite").exit_code == 0
    assert contents(tmp_path / "out").keys() == contents(case.base).keys() | {"README.md"}


def test_a_refused_merge_says_why_in_one_line(tmp_path, case):
    edit_json(case.adapter / "adapter_config.json", peft_type="LORA")
    result = merge(case.adapter, tmp_path / "out")
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("Error: ") and "LORA" in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_wrong_usage_is_told_from_a_failed_merge(tmp_path):
    assert merge(tmp_path).exit_code == 2
    assert merge(tmp_path, tmp_path, "--nonsense").exit_code == 2


def test_a_base_that_only_the_adapter_names_is_reported_with_the_option(tmp_path, case, monkeypatch):
    edit_json(case.adapter / "adapter_config.json", base_model_name_or_path=f"./{case.base.name}")
    monkeypatch.chdir(case.base.parent)
    assert merge(case.adapter, tmp_path / "out", "--dry-run").exit_code == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    result = merge(case.adapter, tmp_path / "out")
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
    for part in (str(case.adapter), f"'./{case.base.name}'", str(tmp_path / "elsewhere"), "--base"):
        assert part in result.stderr
    assert merge(case.adapter, tmp_path / "out", "--base", case.base).exit_code == 0
