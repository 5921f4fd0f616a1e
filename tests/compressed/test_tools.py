# SPDX-License-Identifier: Apache-2.0
"""Every tool takes a compressed checkpoint for the dense one that it is."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from peft_spp import SPPConfig
from peft_spp.checkpoints.compressed_files import read_metadata
from peft_spp.cli import app
from peft_spp.compressed.checkpoint_run import compress_checkpoint, decompress_checkpoint
from peft_spp.merge import merge_checkpoint
from peft_spp.sparsity import compare_sparsity, sparsity_report

from helpers.compressed_cases import pruned_llama, same_tensors, tensors_of
from helpers.tiny import randomize, tiny_llama


def run(*arguments):
    return CliRunner().invoke(app, [str(one) for one in arguments])


def adapter_of(base, folder, **settings):
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    model = get_peft_model(model, SPPConfig(**{"r": 5, "task_type": "CAUSAL_LM", **settings}))
    randomize(model)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def pair(request, tmp_path):
    """The folders of a dense model and the same compressed, in shards."""
    pruned_llama(request.param).save_pretrained(tmp_path / "dense", max_shard_size="16KB")
    compress_checkpoint(tmp_path / "dense", tmp_path / "small")
    return tmp_path / "dense", tmp_path / "small"


def test_a_merge_writes_compressed_what_it_writes_dense(pair, tmp_path):
    dense, small = pair
    adapter = adapter_of(dense, tmp_path / "adapter")
    reports = [
        json.loads(run("merge", adapter, tmp_path / f"merged {base.name}", "--base", base, "--json").stdout)
        for base in (dense, small)
    ]
    for key in ("numel", "zeros_before", "zeros_after", "lost", "gained", "base_masks", "copied"):
        # a bitmask is a tensor that is copied
        extra = len(reports[1]["modules"]) if key == "copied" else 0
        assert reports[1][key] == (reports[0][key] + extra if key == "copied" else reports[0][key]), key
    assert reports[0]["modules"] == reports[1]["modules"]
    merged = tmp_path / "merged small"
    before, after = tensors_of(small), tensors_of(merged)
    assert all(torch.equal(after[name], before[name]) for name in before if name.endswith("bitmask"))
    decompress_checkpoint(merged, tmp_path / "back")
    assert same_tensors(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "merged dense"))
    # and it is what merging in memory makes of it
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(small, dtype="auto"), adapter)
    in_memory = loaded.merge_and_unload()
    in_memory.save_pretrained(tmp_path / "saved")
    assert same_tensors(tensors_of(tmp_path / "saved"), after)
    assert any((one == 0).any() for name, one in after.items() if f"{name[:-7]}.bitmask" in after)  # it was a -0.0
    assert same_tensors(
        in_memory.state_dict(), AutoModelForCausalLM.from_pretrained(merged, dtype="auto").state_dict()
    )


def test_a_merge_refuses_the_same_adapter_twice_and_another_bases(pair, tmp_path):
    dense, small = pair
    adapter = adapter_of(dense, tmp_path / "adapter")
    merge_checkpoint(small, adapter, tmp_path / "merged")
    with pytest.raises(ValueError, match=r"already merged into"):
        merge_checkpoint(tmp_path / "merged", adapter, tmp_path / "twice")
    tiny_llama().to(torch.float32).save_pretrained(tmp_path / "other")
    assert (
        "with different masks"
        in run("merge", adapter, tmp_path / "out", "--base", tmp_path / "other", "--check-base", "error").stderr
    )


def test_a_merge_of_damaged_weights_writes_nothing(pair, tmp_path):
    dense, small = pair
    adapter = adapter_of(dense, tmp_path / "adapter")
    name = "model.layers.1.mlp.up_proj.weight"
    file = next(file for file in small.glob("*.safetensors") if name in load_file(file))
    tensors, metadata = load_file(file), read_metadata(file)
    tensors[name] = tensors[name][1:].clone()
    save_file(tensors, file, metadata)
    for check in ("warn", "off"):
        result = run("merge", adapter, tmp_path / "merged", "--base", small, "--check-base", check)
        assert result.exit_code == 2
        assert name in result.stderr
        assert not (tmp_path / "merged").exists()


def test_reports_and_comparisons_are_the_dense_models(pair, tmp_path):
    dense, small = pair
    reports = [sparsity_report(folder) for folder in (dense, small)]
    assert [vars(one) for one in reports[0]] == [vars(one) for one in reports[1]]
    assert reports[0].skipped == reports[1].skipped
    for before, after in ((dense, small), (small, dense), (small, small)):
        comparison = compare_sparsity(before, after)
        assert comparison.kept
        assert len(comparison) == 21
    found = [json.loads(run("inspect", folder, "--json").stdout) for folder in (dense, small)]
    sizes = [[module.pop("size") for module in one["modules"]] for one in found]
    assert len(sizes[0]) == 21 and all(after < before for before, after in zip(*sizes, strict=True))
    assert found[0]["modules"] == found[1]["modules"]
    assert run("compare", dense, small).exit_code == 0


def test_a_zero_that_is_lost_is_found_in_compressed_weights(pair, tmp_path):
    dense, small = pair
    model = AutoModelForCausalLM.from_pretrained(dense, dtype="auto")
    weight = model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight[(weight == 0).nonzero()[3].tolist()[0], (weight == 0).nonzero()[3].tolist()[1]] = 1.0
    model.save_pretrained(tmp_path / "changed")
    compress_checkpoint(tmp_path / "changed", tmp_path / "changed small")
    for before, after in ((small, tmp_path / "changed small"), (dense, tmp_path / "changed small")):
        result = run("compare", before, after)
        assert result.exit_code == 1
        assert "up_proj" in result.stdout


@pytest.mark.parametrize("shard_size", ["1GB", "16KB"])
def test_prune_writes_compressed_what_it_writes_dense(tmp_path, shard_size):
    tiny_llama().save_pretrained(tmp_path / "dense", max_shard_size=shard_size)
    arguments = ("--method", "magnitude", "--sparsity", "0.5", "--json")
    reports = [
        json.loads(run("prune", tmp_path / "dense", tmp_path / name, *arguments, *more).stdout)
        for name, more in (("pruned", ()), ("small", ("--compress",)))
    ]
    assert reports[0]["modules"] == reports[1]["modules"]
    decompress_checkpoint(tmp_path / "small", tmp_path / "back")
    files = [{one.name: one.read_bytes() for one in (tmp_path / name).iterdir()} for name in ("pruned", "back")]
    for one in files:
        del one["config.json"], one["README.md"]  # sorted otherwise, and named after its folder
    assert files[0] == files[1]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "small").model.layers[0].mlp.up_proj.bitmask.any()
    result = run("prune", tmp_path / "small", tmp_path / "twice", "--method", "magnitude", "--sparsity", "0.7")
    assert result.exit_code == 2
    assert "decompress" in result.stderr
    assert not (tmp_path / "twice").exists()
