# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest

from helpers.one_thread import one_thread as one_thread
from helpers.sft_cases import write_jsonl
from helpers.trl_cases import pruned_model, tiny_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a pruned model and its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    pruned_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def data(tmp_path: Path) -> str:
    """A file of texts."""
    return str(write_jsonl(tmp_path / "data.jsonl"))
