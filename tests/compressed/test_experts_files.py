# SPDX-License-Identifier: Apache-2.0
"""Experts whose zeros are not stored, in files: loading, saving, and the commands."""

import copy
import json

import pytest
import torch
from accelerate import cpu_offload
from peft import get_peft_model
from transformers import AutoModel, AutoModelForCausalLM
from typer.testing import CliRunner

import peft_spp
from peft_spp import BitmaskConfig, SPPConfig
from peft_spp.cli import app
from peft_spp.compressed.checkpoint_run import compress_checkpoint, decompress_checkpoint
from peft_spp.compressed.experts import find_compressed_stacks
from peft_spp.sparsity import compare_sparsity, sparsity_report

from helpers.compressed_cases import same_tensors, tensors_of
from helpers.mixtures import SAVED_ONE_BY_ONE, mixture, pruned_mixture
from helpers.tiny import randomize
from helpers.tiny_moe import IDS


# and two with other names in a checkpoint than in the model
KINDS = [*SAVED_ONE_BY_ONE, "granitemoe", "aria_text"]
pytestmark = pytest.mark.filterwarnings("ignore:.*stay dense")


def load(folder, **settings):
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": "auto", **settings})


def run(*arguments):
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    assert result.exit_code == 0, result.output
    return result


def stacks_of(model):
    return {name for name, one in model.named_parameters() if one.ndim == 3}


@pytest.fixture(params=KINDS)
def saved(request, tmp_path):
    """A mixture in bfloat16, and the folder of a dense checkpoint of it."""
    model = pruned_mixture(request.param, torch.bfloat16)
    model.save_pretrained(tmp_path / "dense")
    return model, tmp_path / "dense"


def test_all_ways_to_a_compressed_checkpoint_give_the_same_and_all_ways_back_every_bit(saved, tmp_path):
    model, dense = saved
    names = stacks_of(model)
    first = load(dense, quantization_config=BitmaskConfig())
    in_memory = peft_spp.compress(copy.deepcopy(model))
    assert find_compressed_stacks(first).keys() == find_compressed_stacks(in_memory).keys() == names
    first.save_pretrained(tmp_path / "loaded")
    in_memory.save_pretrained(tmp_path / "in memory")
    compress_checkpoint(dense, tmp_path / "command")
    tensors = tensors_of(tmp_path / "command")
    for folder in ("loaded", "in memory"):
        assert same_tensors(tensors_of(tmp_path / folder), tensors)
        configs = [json.loads((tmp_path / one / "config.json").read_text()) for one in (folder, "command")]
        assert configs[0]["quantization_config"] == configs[1]["quantization_config"]

    expected = model(IDS).logits
    for folder in ("loaded", "in memory", "command"):
        decompress_checkpoint(tmp_path / folder, tmp_path / f"{folder} again")
        assert same_tensors(tensors_of(tmp_path / f"{folder} again"), tensors_of(dense))
    again = load(tmp_path / "command")
    assert find_compressed_stacks(again).keys() == names
    assert again.config.quantization_config.to_dict() == first.config.quantization_config.to_dict()
    again.save_pretrained(tmp_path / "saved again")
    assert same_tensors(tensors_of(tmp_path / "saved again"), tensors)
    for one in (first, in_memory, again):
        assert (one(IDS).logits - expected).norm() < 0.1 * expected.norm()
        assert same_tensors(peft_spp.decompress(one).state_dict(), model.state_dict())
        one.save_pretrained(tmp_path / "dense again")
        assert same_tensors(tensors_of(tmp_path / "dense again"), tensors_of(dense))


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("shard_size", ["1GB", "6KB"])
@pytest.mark.parametrize("settings", [{}, {"dtype": torch.float16}, {"device_map": "cpu"}], ids=str)
def test_shards_dtypes_and_device_maps(kind, shard_size, settings, tmp_path):
    pruned_mixture(kind).save_pretrained(tmp_path / "dense", max_shard_size=shard_size)
    plain = load(tmp_path / "dense", **settings)
    first = load(tmp_path / "dense", quantization_config=BitmaskConfig(), **settings)
    first.save_pretrained(tmp_path / "small", max_shard_size=shard_size)
    for one in (first, load(tmp_path / "small", **settings)):
        assert find_compressed_stacks(one).keys() == stacks_of(plain)
        assert same_tensors(one.dequantize().state_dict(), plain.state_dict())


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("original", [False, True])
def test_files_with_the_names_of_the_model_are_read_without_it(kind, original, tmp_path):
    model = pruned_mixture(kind)
    peft_spp.compress(copy.deepcopy(model)).save_pretrained(tmp_path / "small", save_original_format=original)
    decompress_checkpoint(tmp_path / "small", tmp_path / "dense")
    assert same_tensors(load(tmp_path / "dense").state_dict(), model.state_dict())
    reports = [sparsity_report(tmp_path / name) for name in ("small", "dense")]
    assert [(one.name, one.zeros) for one in reports[0]] == [(one.name, one.zeros) for one in reports[1]]


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_a_checkpoint_with_whole_stacks_keeps_them_whole(kind, tmp_path):
    model = pruned_mixture(kind)
    model.save_pretrained(tmp_path / "dense", save_original_format=False)
    assert any(name.endswith("experts.gate_up_proj") for name in tensors_of(tmp_path / "dense"))
    compress_checkpoint(tmp_path / "dense", tmp_path / "small")
    loaded = load(tmp_path / "small")
    assert find_compressed_stacks(loaded).keys() == stacks_of(model)
    loaded.save_pretrained(tmp_path / "again")
    assert same_tensors(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "small"))
    assert "model.layers.0.mlp.experts.gate_up_proj_bitmask" in tensors_of(tmp_path / "again")
    assert same_tensors(loaded.dequantize().state_dict(), model.state_dict())


def test_the_body_of_a_model_loads_alone(tmp_path):
    model = pruned_mixture("qwen2_moe")
    peft_spp.compress(copy.deepcopy(model)).save_pretrained(tmp_path)
    body = AutoModel.from_pretrained(tmp_path)
    assert len(find_compressed_stacks(body)) == 4
    assert same_tensors(body.dequantize().state_dict(), model.model.state_dict())


def test_a_stack_without_zeros_stays_dense_as_a_whole(tmp_path):
    model = pruned_mixture("mixtral")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    torch.nn.init.ones_(model.get_parameter(name)[1:])
    model.save_pretrained(tmp_path / "dense")
    with pytest.warns(UserWarning, match=r"1 layers stay dense: model\.layers\.1\.mlp\.experts\.gate_up_proj \(1"):
        first = load(tmp_path / "dense", quantization_config=BitmaskConfig(min_sparsity=0.3))
    assert first.config.quantization_config.modules_to_not_convert == ["lm_head", name]
    first.save_pretrained(tmp_path / "loaded")
    report = compress_checkpoint(tmp_path / "dense", tmp_path / "small", min_sparsity=0.3)
    assert report.kept.keys() == {"lm_head", name}
    assert same_tensors(tensors_of(tmp_path / "small"), tensors_of(tmp_path / "loaded"))
    loaded = load(tmp_path / "small")
    assert find_compressed_stacks(loaded).keys() == stacks_of(model) - {name}
    assert same_tensors(loaded.dequantize().state_dict(), model.state_dict())


@pytest.mark.parametrize("kind", ["qwen2_moe", "gpt_oss"])
def test_reports_read_compressed_experts_from_files(kind, tmp_path):
    pruned_mixture(kind).save_pretrained(tmp_path / "dense")
    report = compress_checkpoint(tmp_path / "dense", tmp_path / "small")
    reports = [sparsity_report(tmp_path / name).to_dict()["modules"] for name in ("dense", "small")]
    assert reports[0] == reports[1]
    before = compare_sparsity(tmp_path / "dense", tmp_path / "dense").to_dict()["modules"]
    assert compare_sparsity(tmp_path / "dense", tmp_path / "small").to_dict()["modules"] == before
    run("inspect", tmp_path / "small")
    run("compare", tmp_path / "dense", tmp_path / "small")
    tensors = tensors_of(tmp_path / "small")
    for one in report:
        bitmask = f"{one.name}.bitmask" if one.tensor.endswith(".weight") else f"{one.name}_bitmask"
        assert one.stored == tensors[one.tensor].numel()
        assert one.compressed_bytes == 4 * one.stored + tensors[bitmask].numel()


PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.mark.parametrize(("kind", "parameters"), [("mixtral", []), ("gpt_oss", []), ("mixtral", PARAMETERS)])
def test_a_merge_from_disk_to_disk_writes_what_a_saved_merge_has(kind, parameters, tmp_path):
    model = pruned_mixture(kind)
    model.save_pretrained(tmp_path / "dense")
    compress_checkpoint(tmp_path / "dense", tmp_path / "small")
    adapted = get_peft_model(load(tmp_path / "small"), SPPConfig(r=4, target_parameters=parameters))
    randomize(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    run("merge", tmp_path / "adapter", tmp_path / "merged", "--base", tmp_path / "small")
    adapted.merge_and_unload().save_pretrained(tmp_path / "expected")
    merged = tensors_of(tmp_path / "merged")
    assert same_tensors(merged, tensors_of(tmp_path / "expected"))
    # the -0.0 of the base, now +0.0, keep their places, also when the model is loaded and saved again
    before = tensors_of(tmp_path / "small")
    assert all(torch.equal(merged[name], one) for name, one in before.items() if name.endswith("bitmask"))
    assert [name for name, one in merged.items() if one.ndim == 1 and (one == 0).any() and "experts" in name]
    load(tmp_path / "merged").save_pretrained(tmp_path / "again")
    assert same_tensors(tensors_of(tmp_path / "again"), merged)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_a_merged_model_is_saved_compressed(kind, tmp_path):
    small, dense = peft_spp.compress(pruned_mixture(kind)), pruned_mixture(kind)
    for name, model in (("small", small), ("dense", dense)):
        adapted = get_peft_model(model, SPPConfig(r=4, target_modules=[], target_parameters=PARAMETERS))
        torch.manual_seed(0)
        randomize(adapted)
        adapted.merge_and_unload().save_pretrained(tmp_path / name)
    loaded = load(tmp_path / "small")
    assert len(find_compressed_stacks(loaded)) == 4
    assert same_tensors(loaded.dequantize().state_dict(), load(tmp_path / "dense").state_dict())


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_pruning_by_command_writes_compressed_experts(kind, tmp_path):
    mixture(kind).save_pretrained(tmp_path / "dense")
    arguments = ("--method", "magnitude", "--pattern", "2:4")
    run("prune", tmp_path / "dense", tmp_path / "plain", *arguments)
    run("prune", tmp_path / "dense", tmp_path / "small", *arguments, "--compress")
    assert any("experts" in name and name.endswith("bitmask") for name in tensors_of(tmp_path / "small"))
    run("decompress", tmp_path / "small", tmp_path / "again")
    assert same_tensors(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "plain"))


def test_offloaded_experts_are_saved_whole_or_not_at_all(tmp_path):
    for kind in ("gpt_oss", "mixtral"):
        model = peft_spp.compress(pruned_mixture(kind))
        expected = model(IDS).logits
        cpu_offload(model, execution_device=torch.device("cpu"))
        torch.testing.assert_close(model(IDS).logits, expected)
        with pytest.raises(ValueError, match=r"has no data in memory \(it is offloaded\)"):
            peft_spp.decompress(model)
        if SAVED_ONE_BY_ONE[kind]:
            with pytest.raises(ValueError, match=r"experts\.gate_up_proj has no data in memory \(it is offloaded\)"):
                model.save_pretrained(tmp_path / kind)


@pytest.mark.parametrize("offload_buffers", [False, True])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("kind", ["qwen2_moe", "gpt_oss"])
def test_a_device_map_puts_experts_on_the_host(kind, compressed, offload_buffers, tmp_path):
    model = pruned_mixture(kind)
    (peft_spp.compress(model) if compressed else model).save_pretrained(tmp_path)
    settings = {} if compressed else {"quantization_config": BitmaskConfig()}
    names = [f"model.{name}" for name in ("embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb")]
    # accelerate takes one for the device that computes, and the other for the host
    device_map = {**dict.fromkeys([*names, "lm_head"], torch.device("cpu")), "model.layers.1": "cpu"}
    loaded = load(tmp_path, device_map=device_map, offload_buffers=offload_buffers, **settings)
    stacks = find_compressed_stacks(loaded)
    assert [loaded.get_parameter(name).is_meta for name in sorted(stacks)] == [False, False, True, True]
    assert torch.equal(loaded(IDS).logits, load(tmp_path, **settings)(IDS).logits)


# the weights of one expert, one that is stored for itself and one of a whole stack
