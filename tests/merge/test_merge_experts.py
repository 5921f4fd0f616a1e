# SPDX-License-Identifier: Apache-2.0
"""Adapters of experts, merged from disk to disk into the layouts of checkpoints."""

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from peft_spp import SPPConfig
from peft_spp.checkpoints.merged import MERGED
from peft_spp.checkpoints.own_files import BASE_MASKS
from peft_spp.compressed import compress_checkpoint, decompress_checkpoint
from peft_spp.merge import MergeReport, merge_checkpoint, pieces
from peft_spp.pruning import prune_checkpoint
from peft_spp.sparsity import compare_sparsity

from helpers.merge_cases import (
    Case,
    assert_same_bits,
    auto,
    contents,
    edit_tensors,
    llama_case,
    merged_by_peft,
    save_adapter,
    stored,
)
from helpers.mixtures import SAVED_ONE_BY_ONE, batches, expert_weights, mixture
from helpers.tiny import prune_


# with other names, with layers of other kinds next to the experts, and with names that Transformers changes
OTHERS = ["phimoe", "granitemoe", "nemotron_h", "qwen3_next", "minimax", "qwen3_vl_moe"]
ADAPTER = "adapter_model.safetensors"


def stacks(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that hold experts."""
    return {
        name: one
        for name, one in model.named_parameters()
        if one.ndim == 3 and (".experts." in name or name.endswith("_linear.weight"))
    }


def save_mixture(
    folder: Path,
    kind: str,
    *,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "20KB",
    parameters: Iterable[str] | None = None,
    **settings,
) -> Case:
    model = mixture(kind, dtype)
    for weight in expert_weights(model).values():
        prune_(weight, "2:4")
    model.save_pretrained(folder / "base", max_shard_size=shard_size)
    model = type(model).from_pretrained(folder / "base")
    parameters = parameters or {".".join(name.split(".")[-2:]) for name in stacks(model)}
    save_adapter(folder / "adapter", model, SPPConfig(r=5, target_parameters=sorted(parameters), **settings))
    return Case(folder / "base", folder / "adapter", type(model))


def assert_merges_as_peft_does(case: Case, folder: Path) -> MergeReport:
    report = merge_checkpoint(case.base, case.adapter, folder / "out", check_base="error")
    assert_same_bits(stored(folder / "out"), stored(merged_by_peft(case, folder / "peft")))
    return report


@pytest.mark.parametrize("kind", [*SAVED_ONE_BY_ONE, *OTHERS])
def test_experts_have_the_bits_of_merge_and_unload(tmp_path, kind):
    case = save_mixture(tmp_path, kind, dtype=torch.bfloat16)
    report = assert_merges_as_peft_does(case, tmp_path)
    loaded = stacks(case.model_class.from_pretrained(tmp_path / "out"))
    experts = {f"{name.removesuffix('.weight')}.{index}" for name, one in loaded.items() for index in range(len(one))}
    assert len(experts) >= 2 * 3 and experts <= report.modules.keys()
    # the masks of the stacks were compared, too
    masks = json.loads((case.adapter / BASE_MASKS).read_text())["masks"]
    assert {name.removesuffix(".weight") for name in loaded} <= {name.removesuffix(".weight") for name in masks}
    assert report.base_masks == f"those that the adapter was trained on, in {len(masks)} modules"


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("mixtral", torch.float32), ("mixtral", torch.float16), ("gpt_oss", torch.float32), ("gpt_oss", torch.bfloat16)],
)
@pytest.mark.parametrize("piece_bytes", [100, 3000])
def test_no_more_than_a_piece_is_read_at_a_time(tmp_path, monkeypatch, dtype, kind, piece_bytes):
    monkeypatch.setattr(pieces, "PIECE_BYTES", piece_bytes)
    sizes = []
    read = pieces.read_bytes
    monkeypatch.setattr(pieces, "read_bytes", lambda *args: sizes.append(args[2] - args[1]) or read(*args))
    case = save_mixture(tmp_path, kind, dtype=dtype, shard_size="1GB", target_modules=[])
    assert_merges_as_peft_does(case, tmp_path)
    row = max(one.shape[-1] for one in stored(case.base).values()) * dtype.itemsize
    assert max(sizes) <= max(piece_bytes, row)


def test_plain_transformers_gives_the_logits_of_the_merged_model(tmp_path):
    case = save_mixture(tmp_path, "qwen3_moe")
    expected = case.peft_model().merge_and_unload().eval()(input_ids=batches()[0]).logits
    base = case.model_class.from_pretrained(case.base).eval()(input_ids=batches()[0]).logits
    merge_checkpoint(case.base, case.adapter, tmp_path / "out")
    merged = auto("AutoModelForCausalLM").from_pretrained(tmp_path / "out").eval()
    assert torch.equal(merged(input_ids=batches()[0]).logits, expected) and not torch.equal(base, expected)


def test_the_report_tells_where_an_expert_is_stored(tmp_path):
    case = save_mixture(tmp_path, "mixtral")
    report = merge_checkpoint(case.base, case.adapter, tmp_path / "out")
    expert = report["model.layers.1.mlp.experts.gate_up_proj.3"]
    assert [one.rpartition(".experts.")[2] for one in expert.tensor.split(", ")] == ["3.w1.weight", "3.w3.weight"]
    assert (expert.shape, expert.r, expert.scaling) == ((48, 32), 5, 32 / 5)
    comparison = compare_sparsity(case.base, tmp_path / "out")
    assert comparison.kept and report.zeros_before == sum(one.zeros_before for one in comparison)
    assert report.numel == sum(one.numel for one in comparison)
    dry = merge_checkpoint(case.base, case.adapter, tmp_path / "again", dry_run=True).to_dict()
    wet = report.to_dict()
    assert {**dry, "dry_run": False, "output": wet["output"]} == wet


@pytest.mark.parametrize(
    ("parameters", "changed"),
    [(["experts.down_proj"], {"w2"}), (["experts.gate_up_proj", "gate.weight"], {"w1", "w3", "gate"})],
)
def test_some_parameters_alone_are_merged(tmp_path, parameters, changed):
    """Factors are saved by their place in a nest of wrappers, so one parameter has another place than two."""
    case = save_mixture(tmp_path, "mixtral", parameters=parameters, target_modules=[])
    assert_merges_as_peft_does(case, tmp_path)
    before, after = stored(case.base), stored(tmp_path / "out")
    assert {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])} == changed


def test_patterns_go_by_the_name_of_the_parameter(tmp_path):
    settings = {"rank_pattern": {"experts.down_proj": 3}, "alpha_pattern": {r"layers\.1\..*gate_up_proj": 7}}
    report = assert_merges_as_peft_does(save_mixture(tmp_path, "mixtral", **settings), tmp_path)
    assert report["model.layers.0.mlp.experts.down_proj.0"].r == 3
    assert report["model.layers.1.mlp.experts.gate_up_proj.2"].scaling == 7 / 5
    assert report["model.layers.0.mlp.experts.gate_up_proj.2"].scaling == 32 / 5


def test_stacks_that_are_stored_the_other_way_round(tmp_path):
    """Qwen3-VL-MoE on the Hub has inputs first, and Transformers saves it with outputs first."""
    case = save_mixture(tmp_path, "qwen3_vl_moe")
    expected = case.peft_model().merge_and_unload().state_dict()
    for file in case.base.glob("*.safetensors"):
        edit_tensors(file, **{name: one.mT for name, one in load_file(file).items() if one.ndim == 3})
    merge_checkpoint(case.base, case.adapter, tmp_path / "out", check_base="error")
    assert_same_bits(case.model_class.from_pretrained(tmp_path / "out").state_dict(), expected)


def test_a_parameter_that_holds_no_experts(tmp_path):
    case = llama_case(tmp_path, SPPConfig(r=5, target_parameters=["embed_tokens.weight"], target_modules=["q_proj"]))
    report = assert_merges_as_peft_does(case, tmp_path)
    assert report["model.embed_tokens"].shape == (64, 32)


def test_other_masks_are_named(tmp_path):
    case = save_mixture(tmp_path, "mixtral")
    file, name = find(case.base, ".experts.2.w3")
    weight = load_file(file)[name]
    weight[5, :4] = 1
    edit_tensors(file, **{name: weight})
    with pytest.raises(ValueError, match=r"different masks.*in 1 of \d+ modules: model\.layers\.\d\.mlp\.experts"):
        merge_checkpoint(case.base, case.adapter, tmp_path / "out", check_base="error")
    with pytest.warns(UserWarning, match="different masks"):
        merge_checkpoint(case.base, case.adapter, tmp_path / "out")


def find(folder: Path, part: str) -> tuple[Path, str]:
    """A file that holds a tensor of such a name, and the name."""
    return next(
        (file, name) for file in sorted(folder.glob("*.safetensors")) for name in load_file(file) if part in name
    )


def assert_refused(case: Case, folder: Path, *named: str) -> None:
    before = contents(folder)
    with pytest.raises(ValueError) as error:
        merge_checkpoint(case.base, case.adapter, folder / "out")
    assert [one for one in named if one not in str(error.value)] == [], error.value
    assert contents(folder) == before


def test_it_is_not_merged_twice(tmp_path):
    case = save_mixture(tmp_path, "mixtral")
    merge_checkpoint(case.base, case.adapter, tmp_path / "merged")
    assert_refused(case._replace(base=tmp_path / "merged"), tmp_path, "already merged")


def test_what_does_not_fit_is_named(tmp_path):
    case = save_mixture(tmp_path, "mixtral")
    weights = load_file(case.adapter / ADAPTER)
    down = "layers.1.mlp.experts.down_proj"
    factors = [name for name in weights if ".layers.1.mlp.experts.spp_" in name]

    half = case._replace(adapter=shutil.copytree(case.adapter, tmp_path / "half"))
    edit_tensors(half.adapter / ADAPTER, **dict.fromkeys(factors))
    (half.adapter / BASE_MASKS).unlink()
    assert_refused(half, tmp_path, down, "missing")

    fewer = case._replace(adapter=shutil.copytree(case.adapter, tmp_path / "fewer"))
    edit_tensors(fewer.adapter / ADAPTER, **{name: weights[name][: len(weights[name]) // 2] for name in factors})
    assert_refused(fewer, tmp_path, down, "(10, 24)", "(20, 24)")


def test_a_checkpoint_that_does_not_hold_the_experts_is_named(tmp_path):
    case = save_mixture(tmp_path, "mixtral", shard_size="1GB")
    bare = case._replace(base=shutil.copytree(case.base, tmp_path / "bare"))
    (bare.base / "config.json").unlink()
    assert_refused(bare, tmp_path, "target_parameters", str(bare.base), "merge_and_unload")


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (
            "mixtral",
            ["block_sparse_moe.experts.1.w1", "block_sparse_moe.experts.1.w2", "block_sparse_moe.experts.3.w3"],
        ),
        ("qwen3_moe", ["experts.1.down_proj", "experts.3.gate_proj"]),
        ("nemotron_h", ["experts.1.down_proj", "experts.3.up_proj"]),
    ],
)
def test_a_missing_expert_is_named(tmp_path, kind, names):
    """Without a down projection there are fewer experts, which could be stacked, each with the factors of another."""
    case = save_mixture(tmp_path, kind, shard_size="1GB")
    whole = load_file(case.base / "model.safetensors")
    for part in names:
        full_name = next(name for name in reversed(whole) if part in name)
        edit_tensors(case.base / "model.safetensors", **{**whole, full_name: None})
        assert_refused(case, tmp_path, str(case.base), f"no tensor '{full_name}',", "Copy or download it again")
        with pytest.raises(ValueError, match=rf"no tensor '{re.escape(full_name)}', .*Copy or download"):
            prune_checkpoint(case.base, tmp_path / "out", method="magnitude", pattern="2:4")


def test_all_that_is_missing_is_named(tmp_path):
    case = save_mixture(tmp_path, "mixtral", shard_size="1GB")
    names = sorted(name for name in stored(case.base) if "layers.1" in name and ".w1." in name)
    edit_tensors(case.base / "model.safetensors", **dict.fromkeys(names[:2]))
    assert_refused(case, tmp_path, f"no tensor '{names[0]}', '{names[1]}', which Transformers puts into")
    edit_tensors(case.base / "model.safetensors", **dict.fromkeys(names[2:]))
    assert_refused(case, tmp_path, "experts.*.w1.weight', which Transformers puts into")


def test_more_experts_than_the_configuration_says(tmp_path):
    case = save_mixture(tmp_path, "qwen3_moe", shard_size="1GB")
    name = "model.layers.0.mlp.experts.{}.down_proj.weight"
    edit_tensors(case.base / "model.safetensors", **{name.format(4): torch.zeros(32, 24)})
    assert_refused(case, tmp_path, name.format(0), "(5, 32, 24), but config.json implies (4, 32, 24)")


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "nemotron_h", "gpt_oss", "granitemoe", "llama4_text"])
@pytest.mark.parametrize("piece_bytes", [100, pieces.PIECE_BYTES])
def test_compressed_experts_have_the_bits_of_merging_dense_ones(tmp_path, monkeypatch, kind, piece_bytes):
    monkeypatch.setattr(pieces, "PIECE_BYTES", piece_bytes)
    case = save_mixture(tmp_path, kind, dtype=torch.bfloat16)
    merge_checkpoint(case.base, case.adapter, tmp_path / "dense")
    compress_checkpoint(case.base, tmp_path / "small")
    merge_checkpoint(tmp_path / "small", case.adapter, tmp_path / "small-merged", check_base="error")
    assert "bitmask" in "".join(stored(tmp_path / "small-merged"))
    decompress_checkpoint(tmp_path / "small-merged", tmp_path / "out")
    assert_same_bits(stored(tmp_path / "out"), stored(tmp_path / "dense"))


@pytest.mark.parametrize("kind", ["gpt_oss", "granitemoe"])
def test_a_compressed_stack_whose_values_and_bitmask_disagree_is_refused(tmp_path, kind):
    case = save_mixture(tmp_path, kind, dtype=torch.bfloat16, shard_size="1GB")
    compress_checkpoint(case.base, tmp_path / "small")
    small = case._replace(base=tmp_path / "small")
    whole = load_file(small.base / "model.safetensors")
    name = next(name for name in whole if "bitmask" in name and "layers.1" in name and whole[name].ndim == 3)
    bits = whole[name].clone()
    bits[-1, -1, 0] ^= 1
    edit_tensors(small.base / "model.safetensors", **{name: bits})
    assert_refused(small, tmp_path, name.removesuffix("_bitmask").removesuffix(".bitmask"), "bitmask")


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_a_merge_is_remembered_the_same_in_memory_and_from_disk(tmp_path, kind):
    case = save_mixture(tmp_path, kind)
    merged_by_peft(case, tmp_path / "memory")
    merge_checkpoint(case.base, case.adapter, tmp_path / "disk")
    listed = [json.loads((tmp_path / folder / "config.json").read_text())[MERGED] for folder in ("memory", "disk")]
    assert listed[0] == listed[1] and len(listed[0]) == 1
    for folder in ("memory", "disk"):
        with pytest.raises(ValueError, match="already merged"):
            merge_checkpoint(tmp_path / folder, case.adapter, tmp_path / "twice")
        base = case.model_class.from_pretrained(tmp_path / folder)
        with pytest.warns(UserWarning, match="already merged"):
            PeftModel.from_pretrained(base, case.adapter)
