# SPDX-License-Identifier: Apache-2.0
"""The corpus of the fuzzer, and the valid files that it starts from, without the fuzzer.

The corpus holds inputs that once made a loader fail other than with an error of ours, and others like them.
"""

from pathlib import Path

import pytest
from fuzz_targets import TARGETS, seeds


CORPUS = Path(__file__).parent / "corpus"


@pytest.mark.parametrize("target", TARGETS)
def test_the_corpus_is_taken_or_refused_by_name(target):
    files = sorted((CORPUS / target).iterdir())
    assert files
    for file in files:
        TARGETS[target](file.read_bytes())


@pytest.mark.parametrize("target", TARGETS)
def test_the_fuzzer_starts_from_files_that_can_be_loaded(target):
    for data in seeds()[target]:
        TARGETS[target](data)
