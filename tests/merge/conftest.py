# SPDX-License-Identifier: Apache-2.0
import shutil

import pytest

from helpers.merge_cases import llama_case


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    return llama_case(tmp_path_factory.mktemp("case"), shard_size="20KB")


@pytest.fixture
def case(made_once, tmp_path):
    """A base in shards and an adapter of it, which a test may change."""
    base, adapter = (shutil.copytree(folder, tmp_path / folder.name) for folder in (made_once.base, made_once.adapter))
    return made_once._replace(base=base, adapter=adapter)


@pytest.fixture
def old_model(tmp_path):
    """A model in the place of the output, with a file that the new one does not have."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "old.safetensors"}}')
    (folder / "old.safetensors").write_bytes(b"old")
    return folder
