# SPDX-License-Identifier: Apache-2.0
"""The table that compares features names tests: they are there."""

import re
from pathlib import Path


TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "comparison.md"


def test_every_test_that_the_comparison_names_exists():
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE.read_text(encoding="utf-8"))
    missing = [
        f"{file}::{test}" for file, test in named if f"def {test}(" not in (TESTS / file).read_text(encoding="utf-8")
    ]
    assert named and not missing
