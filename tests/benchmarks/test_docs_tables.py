# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.docs import INFERENCE_TABLES, TABLES, app, put


ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.mark.parametrize("machine", ["amd-epyc", "intel-xeon"])
def test_the_tables_of_the_pages_are_those_of_the_committed_results(machine, tmp_path):
    options, committed, files = [], {}, 0
    for option, name, tables in (
        ("--page", "performance.md", TABLES),
        ("--inference", "inference.md", INFERENCE_TABLES),
    ):
        page = tmp_path / name
        text = committed[page] = (ROOT / "docs" / name).read_text()
        for table in tables:
            if (RESULTS / machine / f"{table}.json").is_file():
                of_machine = f"{table}@{machine}"
                text = put(text, of_machine if f"<!-- {of_machine}:begin" in text else table, "nothing")
                files += 1
        page.write_text(text)
        options += [option, str(page)]
    result = CliRunner().invoke(app, [str(RESULTS / machine), *options])
    assert result.exit_code == 0 and files, result.output
    for page, text in committed.items():
        assert page.read_text() == text


def test_a_page_without_the_marks_is_refused():
    with pytest.raises(Exception, match="layer:begin"):
        put("no marks", "layer", "table")
