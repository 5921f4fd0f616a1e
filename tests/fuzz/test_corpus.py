# SPDX-License-Identifier: Apache-2.0
"""The corpus of the fuzzer, and the valid files that it starts from, without the fuzzer.

The corpus holds inputs that once made a loader fail other than with an error of ours, and others like them.
"""

import random
from pathlib import Path

import pytest
from fuzz_targets import TARGETS, seeds
from mutations import mutate


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


@pytest.mark.parametrize("target", ["compressed", "old_compressed"])
def test_mutated_files_with_compressed_weights_are_taken_or_refused_by_name(target):
    rng = random.Random(0)
    pool = seeds()[target]
    taken = 0
    for seed in range(2000):
        data = mutate(target, rng.choice(pool), seed)
        if data is not None:
            TARGETS[target](data)
            taken += 1
            if rng.random() < 0.05:
                pool.append(data)  # so that changes add up
    assert taken > 1000
