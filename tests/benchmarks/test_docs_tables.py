# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.docs import INFERENCE_TABLES, TABLES, app, put


ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "amd-epyc"


def test_the_tables_of_the_pages_are_those_of_the_committed_results(tmp_path):
    options, committed = [], {}
    for option, name, tables in (
        ("--page", "performance.md", TABLES),
        ("--inference", "inference.md", INFERENCE_TABLES),
    ):
        page = tmp_path / name
        text = committed[page] = (ROOT / "docs" / name).read_text()
        for table in tables:
            text = put(text, table, "nothing")
        page.write_text(text)
        options += [option, str(page)]
    result = CliRunner().invoke(app, [str(RESULTS), *options])
    assert result.exit_code == 0, result.output
    for page, text in committed.items():
        assert page.read_text() == text


def test_a_page_without_the_marks_is_refused():
    with pytest.raises(Exception, match="layer:begin"):
        put("no marks", "layer", "table")
