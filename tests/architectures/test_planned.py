# SPDX-License-Identifier: Apache-2.0
"""Plans of a training step for every causal language model of Transformers, against the committed table."""

import json
import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parent))

import planned


ROWS = json.loads(planned.TABLE.read_text())
PAGE = Path(__file__).parents[2] / "docs" / "planning.md"


def test_the_table_has_no_fault_and_the_page_counts_it():
    names = {
        status: [name for name, row in ROWS.items() if row["status"] == status] for status in ("planned", "refused")
    }
    assert {row["status"] for row in ROWS.values()} <= {"planned", "refused", "unusable"}
    refused = ", ".join(f"`{name}`" for name in names["refused"])
    counted = f"{len(names['planned'])} are planned and {len(names['refused'])} are not: {refused}."
    assert counted in " ".join(PAGE.read_text().split())


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "xlm"])
def test_a_few_types_in_every_run(model_type):
    assert planned.check(model_type) == ROWS[model_type]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", [name for name, row in ROWS.items() if row["status"] != "unusable"])
def test_every_type(model_type):
    row = planned.check(model_type)
    assert row == ROWS[model_type] or row["status"] == "unusable"
