# SPDX-License-Identifier: Apache-2.0
"""Models, data and requests that cannot be pruned from disk to disk are named, and nothing is written."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peft_spp.pruning import prune_checkpoint

from helpers.dense_checkpoints import SMALL, edit_config, edit_shards
from helpers.merge_cases import contents, edit_tensors


UP_PROJ = "model.layers.1.mlp.up_proj.weight"


def break_weight(model: Path) -> None:
    edit_shards(model, **{UP_PROJ: lambda tensor: tensor.index_fill_(0, torch.tensor(3), torch.nan)})


def other_dtype(model: Path) -> None:
    edit_shards(model, **{UP_PROJ: lambda tensor: tensor.half()})


def rename_tensor(model: Path) -> None:
    index = json.loads((model / "model.safetensors.index.json").read_text())
    file = model / index["weight_map"][UP_PROJ]
    edit_tensors(file, **{UP_PROJ: None, "renamed": load_file(file)[UP_PROJ]})
    index["weight_map"]["renamed"] = index["weight_map"].pop(UP_PROJ)
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def remove_tokenizer(model: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(
    ("break_model", "arguments", "message"),
    [
        (None, {"pattern": "4:2"}, "4:2"),
        (None, {"pattern": None, "sparsity": 1.5}, r"1\.5"),
        (None, {"sparsity": 0.5}, "exactly one"),
        (None, {"method": "obc"}, "'obc' is not one of 'wanda', 'magnitude', 'sparsegpt'"),
        (None, {"calibration": None}, "method='wanda' needs calibration data"),
        (None, {"calibration": Path("missing.txt")}, "the file 'missing.txt' does not exist"),
        (None, {"calibration": Path()}, "calibration file . is a folder"),
        (None, {"calibration": [torch.arange(12)[None] - 5]}, "contains token -5: ids of tokens start at 0"),
        (None, {"calibration": [torch.tensor([[5, 300]])]}, "contains token 300, but .* embeddings for only 300"),
        (None, {"samples": 10_000}, "samples=10000"),
        (None, {"sequence_length": 65}, "65 exceeds the model's context of 64"),
        (None, {"target_modules": ["qkv"]}, "qkv"),
        (None, {"target_modules": ["lm_head"]}, "lm_head is outside the transformer blocks"),
        (None, {"exclude_modules": ".*"}, "excluded"),
        (None, {"pattern": "3:7"}, "32 input features of model.layers.0.self_attn.q_proj"),
        (None, {"method": "sparsegpt", "damping": -1}, "damping should be positive"),
        (break_weight, {}, r"'model\.layers\.1\.mlp\.up_proj\.weight' .* contains 32 NaN or infinite values"),
        (break_weight, {"dry_run": True}, r"'model\.layers\.1\.mlp\.up_proj\.weight' .* NaN or infinite"),
        (break_weight, {"method": "magnitude"}, r"'model\.layers\.1\.mlp\.up_proj\.weight' .* NaN or infinite"),
        (other_dtype, {}, "up_proj.*float16"),
        (rename_tensor, {}, "has no tensor 'model.layers.1.mlp.up_proj.weight'"),
        (remove_tokenizer, {}, "the tokenizer of"),
        (edit_config(model_type="nonsense", architectures=["Nonsense"]), {}, "nonsense"),
        (edit_config(quantization_config={"quant_method": "gptq"}), {}, "prune before quantizing"),
        (edit_config(intermediate_size=64), {}, "config.json implies"),
        (edit_config(num_hidden_layers=0), {}, "no transformer blocks"),
        (
            edit_config(tie_word_embeddings=True),
            {"method": "magnitude", "target_modules": ["lm_head"]},
            "lm_head shares",
        ),
    ],
)
def test_refusals_name_the_culprit_and_write_nothing(
    tmp_path: Path, model: Path, text: Path, break_model, arguments: dict, message: str
) -> None:
    if break_model is not None:
        break_model(model)
    before = contents(tmp_path)
    wanted = {"pattern": "2:4", "calibration": text, **SMALL, **arguments}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prune_checkpoint(model, tmp_path / "out", **wanted)
    assert contents(tmp_path) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["", "  \n ", "not json", '{"other": "field"}', '{"text": 3}', "[1]"])
def test_a_bad_calibration_file_is_named(tmp_path: Path, model: Path, content: str) -> None:
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"bad\.jsonl"):
        prune_checkpoint(model, tmp_path / "out", pattern="2:4", calibration=tmp_path / "bad.jsonl")


def test_the_output_may_not_be_in_the_model(tmp_path: Path, model: Path) -> None:
    for out in (model / "out", tmp_path):
        with pytest.raises((ValueError, FileExistsError)):
            prune_checkpoint(model, out, method="magnitude", pattern="2:4", overwrite=True)


def test_an_interruption_leaves_nothing(tmp_path: Path, model: Path, text: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == total - 1:
            raise KeyboardInterrupt

    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        prune_checkpoint(model, tmp_path / "out", pattern="2:4", calibration=text, progress=interrupt, **SMALL)
    assert sorted(tmp_path.iterdir()) == before
