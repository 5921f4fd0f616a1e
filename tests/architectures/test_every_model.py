# SPDX-License-Identifier: Apache-2.0
"""The default targets and merging on a tiny model of every class of Transformers, against the committed table."""

import json
import sys
from pathlib import Path

import pytest
import transformers


sys.path.insert(0, str(Path(__file__).parent))

import sweep


ROWS = json.loads(sweep.TABLE.read_text())
CHECKED = [name for name, row in ROWS.items() if row["status"] != "unusable"]


def test_the_table_has_no_fault_and_the_page_is_made_of_it():
    assert not [name for name, row in ROWS.items() if row["status"] == "fault"]
    written = sweep.PAGE.read_text()
    assert written == sweep.page(ROWS).replace(
        transformers.__version__, written.split("Transformers ")[1].split(" ")[0]
    )


@pytest.mark.parametrize("model_type", ["llama", "t5", "vit"])
def test_a_few_types_in_every_run(model_type):
    assert sweep.check(model_type) == ROWS[model_type]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", CHECKED)
def test_every_type(model_type):
    # a type that has its blocks under other names in another version of Transformers is not a fault
    assert sweep.check(model_type)["status"] in {ROWS[model_type]["status"], "unusable"}
