# SPDX-License-Identifier: Apache-2.0
"""A folder in which the code of the pages runs: small models under the names that the pages use."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from helpers.one_thread import one_thread as one_thread


# the site is built with the extra `docs`
if importlib.util.find_spec("mkdocs") is None:
    collect_ignore = ["test_site.py"]

TEXTS = [f"Line {number} is about the number {number * number % 17}." for number in range(1000)]
PRUNED = ("my-pruned-model", "vuiseng9/Meta-Llama-3.1-8B-wanda-2of4", "RedHatAI/Sparse-Llama-3.1-8B-2of4")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dense and the pruned models, an adapter, and a merged model."""
    from peft import get_peft_model

    from peft_spp import SPPConfig
    from peft_spp.demo.data import train_tokenizer

    from helpers.tiny import block_linears, prune_, randomize, tiny_llama

    folder = tmp_path_factory.mktemp("models")
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    tokenizer = train_tokenizer(TEXTS, vocab_size=280)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    llama = tiny_llama(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, pad_token_id=1)
    llama.save_pretrained(folder / "my-dense-model")
    for layer in block_linears(llama).values():
        prune_(layer.weight, "2:4")
    for name in PRUNED:
        llama.save_pretrained(folder / name)
    for name in ("my-dense-model", *PRUNED):
        tokenizer.save_pretrained(folder / name)
    llama.name_or_path = "my-pruned-model"
    model = get_peft_model(llama, SPPConfig(task_type="CAUSAL_LM"))
    randomize(model, scale=0.1)
    model.save_pretrained(folder / "my-adapter")
    model.merge_and_unload().save_pretrained(folder / "my-model")
    tokenizer.save_pretrained(folder / "my-model")
    return folder


@pytest.fixture
def folder_of_models(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the models, as the current folder."""
    folder = tmp_path / "here"
    shutil.copytree(models, folder)
    monkeypatch.chdir(folder)
    return folder
