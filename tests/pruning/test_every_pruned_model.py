# SPDX-License-Identifier: Apache-2.0
"""The table that `pruning_sweep.py` writes: pruning of a tiny model of every class of Transformers."""

import json

import pytest
from pruning_sweep import TABLE, check


FOUND = json.loads(TABLE.read_text())
CALLED = [model_type for model_type, result in FOUND.items() if result["status"] != "unusable"]


def test_each_class_agrees_with_plain_float64_or_is_refused() -> None:
    statuses = {model_type: FOUND[model_type]["status"] for model_type in CALLED}
    assert set(statuses.values()) <= {"agrees", "refused", "no blocks"}
    assert sum(status == "agrees" for status in statuses.values()) > 0.8 * len(statuses)
    assert all(FOUND[model_type]["reason"] for model_type in CALLED if statuses[model_type] == "refused")


def test_most_mixtures_are_pruned_from_disk_as_in_memory() -> None:
    found = [FOUND[model_type]["from disk"] for model_type in CALLED if "from disk" in FOUND[model_type]]
    assert len(found) > 50
    assert sum(one["magnitude"] == "agrees" for one in found) > 0.95 * len(found)
    assert sum(one["wanda"] == "agrees" for one in found) > 0.8 * len(found)
    assert not any("differs" in one.values() for one in found)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", CALLED)
def test_the_table_is_what_pruning_does(model_type: str) -> None:
    result = check(model_type)
    for key in ("status", "class", "layers", "not reached", "from disk"):
        assert result.get(key) == FOUND[model_type].get(key), (key, result)
