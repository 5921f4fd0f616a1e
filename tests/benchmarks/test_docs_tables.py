# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.docs import TABLES, app, put


ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "amd-epyc"


def test_the_tables_of_the_page_are_those_of_the_committed_results(tmp_path):
    page = tmp_path / "performance.md"
    committed = (ROOT / "docs" / "performance.md").read_text()
    text = committed
    for name in TABLES:
        text = put(text, name, "nothing")
    page.write_text(text)
    result = CliRunner().invoke(app, [str(RESULTS), "--page", str(page)])
    assert result.exit_code == 0, result.output
    assert page.read_text() == committed


def test_a_page_without_the_marks_is_refused():
    with pytest.raises(Exception, match="layer:begin"):
        put("no marks", "layer", "table")
