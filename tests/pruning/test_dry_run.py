# SPDX-License-Identifier: Apache-2.0
"""A dry run and a run refuse the same, before anything is pruned."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from peft_spp.pruning import checkpoint, dense_run, prune_checkpoint

from helpers.dense_checkpoints import SMALL, TEXT, edit_config, edit_shards, save_model
from helpers.merge_cases import contents
from helpers.tiny import tiny


FIVE = torch.tensor([5])


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("dense") / "model")


def without_a_norm(model: Path, options: dict) -> None:
    edit_shards(model, **{"model.layers.2.input_layernorm.weight": None})


def with_nan_in_a_norm(model: Path, options: dict) -> None:
    edit_shards(model, **{"model.layers.2.input_layernorm.weight": lambda tensor: tensor * torch.nan})


def with_nan_in_the_embeddings(model: Path, options: dict) -> None:
    edit_shards(model, **{"model.embed_tokens.weight": lambda tensor: tensor.fill_(torch.inf)})


def with_nan_in_the_last_weight(model: Path, options: dict) -> None:
    edit_shards(model, **{"model.layers.2.mlp.down_proj.weight": lambda tensor: tensor * torch.nan})


def with_fewer_embeddings(model: Path, options: dict) -> None:
    edit_config(vocab_size=20)(model)
    edit_shards(
        model,
        **dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), lambda tensor: tensor[:20].contiguous()),
    )


def on_a_device_that_is_not_there(model: Path, options: dict) -> None:
    options["device"] = "cuda:99"


def on_a_device_of_another_name(model: Path, options: dict) -> None:
    options["device"] = "gpu"


def over_foreign_files(model: Path, options: dict) -> None:
    shutil.copytree(model, model.parent / "out")
    (model.parent / "out" / "notes.txt").write_text("mine")
    options["overwrite"] = True


def into_a_file(model: Path, options: dict) -> None:
    (model.parent / "out").write_text("mine")


def with_batches_that_are_empty(model: Path, options: dict) -> None:
    options["calibration"] = iter([])


def with_a_batch_of_other_tokens(model: Path, options: dict) -> None:
    options["calibration"] = iter([torch.tensor([[1, 2, 10_000]])])


def with_a_sparsity_that_rounds_to_nothing(model: Path, options: dict) -> None:
    options["pattern"], options["sparsity"] = None, 0.0001


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (without_a_norm, r"has no tensor 'model\.layers\.2\.input_layernorm\.weight'"),
        (with_nan_in_a_norm, r"'model\.layers\.2\.input_layernorm\.weight'.* 32 NaN or infinite values"),
        (with_nan_in_the_embeddings, r"'model\.embed_tokens\.weight'.*infinite"),
        (with_nan_in_the_last_weight, r"'model\.layers\.2\.mlp\.down_proj\.weight'.*NaN"),
        (with_fewer_embeddings, "embeddings for only 20"),
        (on_a_device_that_is_not_there, "device='cuda:99' cannot be used"),
        (on_a_device_of_another_name, "device='gpu' cannot be used"),
        (over_foreign_files, r"notes\.txt"),
        (into_a_file, "out is a file"),
        (with_batches_that_are_empty, "no calibration data"),
        (with_a_batch_of_other_tokens, "token 10000"),
        (with_a_sparsity_that_rounds_to_nothing, "so 21 of 21 layers stay dense"),
    ],
)
@pytest.mark.parametrize("dry_run", [True, False])
def test_what_a_run_refuses_a_dry_run_refuses(tmp_path, monkeypatch, dense, breaks, message, dry_run):
    model = tmp_path / "model"
    shutil.copytree(dense, model)
    (tmp_path / "text.txt").write_text(TEXT)
    options = {"pattern": "2:4", "calibration": tmp_path / "text.txt", **SMALL}
    breaks(model, options)
    before = contents(tmp_path)

    def too_late(*_: object) -> None:
        raise AssertionError("the run has started")

    monkeypatch.setattr(dense_run, "enter_blocks", too_late)
    with pytest.raises((ValueError, FileExistsError), match=message):
        prune_checkpoint(model, tmp_path / "out", dry_run=dry_run, **options)
    assert contents(tmp_path) == before


@pytest.fixture(scope="module")
def reading(tmp_path_factory) -> Path:
    """A model with a layer that is never called: its parent reads the weight."""
    folder = tmp_path_factory.mktemp("reading") / "model"
    settings = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4, "time_step_rank": 4}
    tiny("MambaForCausalLM", **settings).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_layer_that_no_data_reaches_is_refused_before_anything_is_written(tmp_path, monkeypatch, reading, dry_run):
    def too_late(*_: object) -> None:
        raise AssertionError("the run has started")

    options = {"pattern": "2:4", "calibration": [torch.arange(3, 15)[None]] * 2, "dry_run": dry_run}
    monkeypatch.setattr(checkpoint, "_copy_files", too_late)
    with pytest.raises(ValueError, match=r"reached backbone\.layers\.0\.mixer\.dt_proj.*exclude_modules"):
        prune_checkpoint(reading, tmp_path / "out", **options)
    monkeypatch.undo()
    report = prune_checkpoint(reading, tmp_path / "out", exclude_modules=["dt_proj"], **options)
    assert len(report.modules) == 3 and (tmp_path / "out").exists() != dry_run


@pytest.mark.parametrize("dry_run", [True, False])
def test_data_that_reach_a_layer_later_than_in_the_first_batch_are_enough(tmp_path, dense, dry_run):
    shutil.copytree(dense, tmp_path / "model")
    edit_shards(tmp_path / "model", **{"model.embed_tokens.weight": lambda tensor: tensor.index_fill(0, FIVE, 0.0)})
    options = {"pattern": "2:4", "dry_run": dry_run}
    silent = torch.full((1, 8), 5)  # all of its hidden states are zero
    with pytest.raises(ValueError, match=r"inputs of model\.layers\.0\.self_attn\.q_proj are all zero"):
        prune_checkpoint(tmp_path / "model", tmp_path / "out", calibration=[silent], **options)
    prune_checkpoint(tmp_path / "model", tmp_path / "out", calibration=[silent, torch.arange(8)[None]], **options)


def test_a_dry_run_says_which_files_give_way(tmp_path, dense):
    shutil.copytree(dense, tmp_path / "out")
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    report = prune_checkpoint(dense, tmp_path / "out", method="magnitude", pattern="2:4", overwrite=True, dry_run=True)
    assert list(report.overwritten) == before and f"{len(before)} files in the output folder would be" in str(report)


# of each: what it is, and a part of the text that the new card keeps
CARDS = {
    "numbers": (b"---\ntags:\n- 4\n- 2.5\n- true\n---\n# Mine\n", "# Mine"),
    "a string": (b"---\ntags: llama\n---\n# Mine\n", "- llama"),
    "broken": (b"---\ntags: [a\nb: : :\n---\n# Mine\n", "# Mine"),
    "a rule": (b"---\n# Mine\n\nmore\n---\nrest", "rest"),
    "one rule": (b"---\n# Mine\n", "# Mine"),
    "latin-1": ("# Déjà vu".encode("latin-1"), "Déjà vu"),
    "utf-16": ("# Déjà vu".encode("utf-16"), "Déjà vu"),
    "a mark": (b"\xef\xbb\xbf---\nlicense: mit\n---\n# Mine", "license: mit"),
    "crlf": (b"---\r\nlicense: mit\r\n---\r\n# Mine\r\n", "license: mit"),
    "empty": (b"", "## Pruning"),
    "a list": (b"---\n- a\n- b\n---\n# Mine", "# Mine"),
    "no month": (b"---\nday: 2024-13-45\n---\n# Mine", "# Mine"),
    "an object": (b"---\na: !!python/object:os.x {}\n---\n# Mine", "# Mine"),
    "an alias of itself": (b"---\na: &a [*a]\n---\n# Mine", "# Mine"),
    "deep": (b"---\na: " + b"[" * 5000 + b"]" * 5000 + b"\n---\n# Mine", "# Mine"),
    "control characters": (b"---\na: \x00b\n---\n# Mi\x01ne", "# Mine"),
    "tabs": (b"---\n\ta: 1\n---\n# Mine", "# Mine"),
    "keys": (b"---\n1: a\nnull: b\n? [1, 2]\n: d\n---\n# Mine", "# Mine"),
    "index": (b"---\nmodel-index:\n- name: 3\n  results: 5\n---\n# Mine", "model-index"),
    "bytes": (bytes(range(256)), "ABC"),
    "emoji": ("# Mine \U0001f469\u200d\U0001f680".encode(), "\U0001f469\u200d\U0001f680"),
}


@pytest.mark.filterwarnings("ignore:The model card")
@pytest.mark.parametrize("kind", CARDS)
def test_no_card_ends_a_run(tmp_path, dense, kind):
    content, kept = CARDS[kind]
    for file in dense.iterdir():
        (tmp_path / "model" / file.name).parent.mkdir(exist_ok=True)
        os.link(file, tmp_path / "model" / file.name)
    (tmp_path / "model" / "README.md").write_bytes(content)
    prune_checkpoint(tmp_path / "model", tmp_path / "out", method="magnitude", pattern="2:4")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert kept in card and "- pruned" in card and "## Pruning" in card
