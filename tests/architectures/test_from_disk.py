# SPDX-License-Identifier: Apache-2.0
"""Pruning and merging from disk, on a tiny model of every causal language model, against the committed table."""

import json
import sys
from pathlib import Path

import pytest
import transformers


sys.path.insert(0, str(Path(__file__).parent))

import from_disk


ROWS = json.loads(from_disk.TABLE.read_text())
CHECKED = [name for name, row in ROWS.items() if row["status"] == "checked"]


def test_the_table_has_no_fault_and_the_page_is_made_of_it():
    assert {row["status"] for row in ROWS.values()} <= {"checked", "unusable", "no blocks"}
    written = from_disk.PAGE.read_text()
    version = written.split("Transformers ")[1].split(";")[0]
    assert written == from_disk.page(ROWS).replace(
        f"Transformers {transformers.__version__};", f"Transformers {version};"
    )


def test_nearly_all_agree():
    assert len(CHECKED) > 0.9 * len(ROWS)
    for way in from_disk.WAYS:
        assert sum(ROWS[name][way] == "agrees" for name in CHECKED) > 0.9 * len(CHECKED)


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_a_few_types_in_every_run(model_type):
    assert from_disk.check(model_type) == ROWS[model_type]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", CHECKED)
def test_every_type(model_type):
    # a type that cannot be built by another version of Transformers is not a fault
    row = from_disk.check(model_type)
    assert row == ROWS[model_type] or row["status"] == "unusable"
