# SPDX-License-Identifier: Apache-2.0
"""Every tool reads of a folder what Transformers loads from it, or refuses it by name."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_spp.checkpoints.checkpoint import read_checkpoint
from peft_spp.inspection import inspect_checkpoint
from peft_spp.sparsity import compare_sparsity, sparsity_report

from helpers.tiny import tiny_llama


INDEX = "model.safetensors.index.json"
NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    tiny_llama().save_pretrained(tmp_path / "model", max_shard_size="20KB")
    return tmp_path / "model"


def index(model: Path) -> dict:
    return json.loads((model / INDEX).read_text())


def leave_out_of_the_index(model: Path) -> None:
    content = index(model)
    del content["weight_map"][NAME]
    (model / INDEX).write_text(json.dumps(content))


def name_another_shard(model: Path) -> None:
    content = index(model)
    here = content["weight_map"][NAME]
    content["weight_map"][NAME] = next(shard for shard in content["weight_map"].values() if shard != here)
    (model / INDEX).write_text(json.dumps(content))


def put_a_single_file_next_to_it(model: Path) -> None:
    tensors = {name: tensor for file in model.glob("*.safetensors") for name, tensor in load_file(file).items()}
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, model / "model.safetensors", {"format": "pt"})


def put_other_files_next_to_it(model: Path) -> None:
    save_file({NAME: torch.zeros(48, 32)}, model / "consolidated.safetensors")
    save_file({NAME: torch.zeros(48, 32)}, model / "model-00099-of-00099.safetensors")
    (model / "original").mkdir()
    save_file({NAME: torch.zeros(48, 32)}, model / "original" / "model.safetensors")


def hold_a_tensor_twice(model: Path) -> None:
    here = index(model)["weight_map"][NAME]
    other = next(file for file in sorted(model.glob("*.safetensors")) if file.name != here)
    save_file({**load_file(other), NAME: torch.zeros(48, 32)}, other, {"format": "pt"})


def name_the_weights_in_config_json(model: Path) -> None:
    (model / INDEX).rename(model / "other.safetensors.index.json")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "transformers_weights": "other.safetensors.index.json"}))


def put_shards_into_a_folder(model: Path) -> None:
    (model / "shards").mkdir()
    for file in list(model.glob("*.safetensors")):
        file.rename(model / "shards" / file.name)
    content = index(model)
    content["weight_map"] = {name: f"shards/{shard}" for name, shard in content["weight_map"].items()}
    (model / INDEX).write_text(json.dumps(content))


@pytest.mark.parametrize(
    "change",
    [
        leave_out_of_the_index,
        put_a_single_file_next_to_it,
        put_other_files_next_to_it,
        name_the_weights_in_config_json,
        put_shards_into_a_folder,
    ],
)
def test_what_transformers_loads_is_what_is_read(model, change):
    change(model)
    loaded = type(tiny_llama()).from_pretrained(model).state_dict()
    checkpoint = read_checkpoint(model)
    assert checkpoint.tensors.keys() == loaded.keys()
    for name, stored in checkpoint.tensors.items():
        assert torch.equal(stored.load(), loaded[name]), name
    reports = (sparsity_report(model), inspect_checkpoint(model), compare_sparsity(model, model))
    assert [len(report) for report in reports] == [21] * 3


@pytest.mark.parametrize(("change", "message"), [(name_another_shard, NAME), (hold_a_tensor_twice, NAME)])
def test_what_contradicts_itself_is_refused_by_all(model, change, message):
    change(model)
    for read in (read_checkpoint, sparsity_report, inspect_checkpoint, lambda path: compare_sparsity(path, path)):
        with pytest.raises(ValueError, match=message):
            read(model)


def test_a_tensor_without_elements_is_read(model):
    file = model / index(model)["weight_map"][NAME]
    more = {"empty": torch.zeros(0, 4), "scale": torch.tensor(2.0)}
    save_file({**load_file(file), **more}, file, {"format": "pt"})
    tensors = read_checkpoint(model).tensors
    for name, tensor in more.items():
        assert torch.equal(tensors[name].load(), tensor), name
    assert len(compare_sparsity(model, model)) == len(inspect_checkpoint(model)) == 21


def of_a_run(folder: Path, *names: str) -> None:
    for step in (8, 10, 9):
        (folder / f"checkpoint-{step}").mkdir()
        for name in names:
            (folder / f"checkpoint-{step}" / name).write_text("{}")


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")


ADAPTER = r", but an adapter: pass the model that it is for, or merge it first \(peft-spp merge\)$"


@pytest.mark.parametrize(
    ("fill", "message"),
    [
        (lambda folder: None, "$"),
        (lambda folder: make(folder, "tokenizer.json", "config.json", "training_args.bin"), "$"),
        (lambda folder: make(folder, "adapter_config.json"), ADAPTER),
        (lambda folder: make(folder, "adapter_config.json", "adapter_model.safetensors"), ADAPTER),
        (lambda folder: make(folder, "adapter_config.json", "adapter_model.bin"), ADAPTER),
        (lambda folder: of_a_run(folder, "model.safetensors"), r"\. Pass .*checkpoint-10$"),
        (
            lambda folder: make(folder, "v2/model.safetensors", "large/model.safetensors.index.json", "c/config.json"),
            r"\. Pass one of its folders: large, v2$",
        ),
        (
            lambda folder: of_a_run(folder, "adapter_config.json"),
            r"\. It has adapters in its folders: checkpoint-8, checkpoint-9, checkpoint-10$",
        ),
        (
            lambda folder: make(folder, *(f"{name}/adapter_config.json" for name in "abcdef")),
            r"\. It has adapters in its folders: d, e, f and 3 more$",
        ),
        (lambda folder: make(folder, "model-q4.gguf"), r", but model-q4\.gguf, and only safetensors is read\. Load"),
        (lambda folder: make(folder, "optimizer.pt", "tf_model.h5"), r", but tf_model\.h5, and only"),
    ],
)
def test_a_folder_without_a_model_is_told_by_what_it_holds(model, tmp_path, fill, message):
    folder = tmp_path / "folder"
    folder.mkdir()
    fill(folder)
    for call in (
        lambda: sparsity_report(folder),
        lambda: compare_sparsity(model, folder),
        lambda: compare_sparsity(folder, model),
        lambda: read_checkpoint(folder),
    ):
        with pytest.raises(ValueError, match=rf"folder {folder} holds no model in safetensors{message}"):
            call()


def test_a_folder_inside_that_cannot_be_read_is_passed_over(tmp_path, monkeypatch):
    """As `lost+found`, at the root of a file system."""
    make(tmp_path, "lost+found/model.safetensors")
    of_a_run(tmp_path, "model.safetensors")
    stat = os.stat

    def refuses(path, *args, **kwargs):
        if "lost+found" in Path(path).parent.name:
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *args, **kwargs)

    monkeypatch.setattr("os.stat", refuses)
    with pytest.raises(ValueError, match=r"holds no model in safetensors\. Pass .*checkpoint-10$"):
        sparsity_report(tmp_path)
