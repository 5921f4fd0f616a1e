# SPDX-License-Identifier: Apache-2.0
"""Mixtures pruned from disk to disk, in the layouts of their checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import conversion_mapping
from transformers.core_model_loading import Chunk, Concatenate, WeightConverter

from peft_spp.checkpoints.checkpoint import read_checkpoint
from peft_spp.pruning import prune_checkpoint, prune_magnitude, prune_sparsegpt, prune_wanda
from peft_spp.pruning.skeleton import Skeleton
from peft_spp.sparsity import sparsity_report

from helpers.dense_checkpoints import peak_of_tensors
from helpers.every_model import build
from helpers.mixtures import SAVED_ONE_BY_ONE, batches, expert_weights, mixture, most_in_a_group
from helpers.tiny_moe import tiny_moe


PRUNERS = {
    "magnitude": lambda model, data, **request: prune_magnitude(model, **request),
    "wanda": prune_wanda,
    "sparsegpt": prune_sparsegpt,
}
ROUTERS = {"gate", "router", "shared_expert_gate"}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def differing(one: Path, other: Path) -> list[str]:
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8))]


@pytest.mark.filterwarnings("ignore:Fewer than 16 calibration tokens")
@pytest.mark.parametrize("method", PRUNERS)
@pytest.mark.parametrize("kind", SAVED_ONE_BY_ONE)
def test_from_disk_gives_the_bits_of_pruning_in_memory(tmp_path: Path, kind: str, method: str) -> None:
    data = None if method == "magnitude" else batches()
    dense = mixture(kind, torch.bfloat16)
    dense.save_pretrained(tmp_path / "dense", max_shard_size="60KB")
    assert any(".experts.3." in name for name in tensors(tmp_path / "dense")) is SAVED_ONE_BY_ONE[kind]

    report = prune_checkpoint(tmp_path / "dense", tmp_path / "out", method=method, pattern="2:4", calibration=data)
    model = type(dense).from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    PRUNERS[method](model, data, pattern="2:4")
    model.save_pretrained(tmp_path / "expected", max_shard_size="60KB")
    assert differing(tmp_path / "out", tmp_path / "expected") == []

    loaded = type(dense).from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    with torch.no_grad():
        ids = batches()[0]
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    experts = expert_weights(loaded)
    assert len(experts) >= 2 * 4
    assert {most_in_a_group(weight) for weight in experts.values()} == {2}
    assert experts.keys() <= report.modules.keys()
    for name, parameter in loaded.named_parameters():
        if set(name.split(".")) & ROUTERS:
            assert torch.equal(parameter, dense.get_parameter(name)), name
    assert report.zeros_after == sum(one.zeros for one in sparsity_report(tmp_path / "out"))


def test_the_report_tells_where_an_expert_is_stored(tmp_path: Path) -> None:
    mixture("mixtral").save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    request = {"method": "magnitude", "pattern": "2:4", "dry_run": True}
    report = prune_checkpoint(tmp_path / "dense", tmp_path / "out", **request)
    expert = report["model.layers.1.mlp.experts.gate_up_proj.3"]
    assert [one.rpartition(".experts.")[2] for one in expert.tensor.split(", ")] == ["3.w1.weight", "3.w3.weight"]
    assert expert.shape == (48, 32)
    stored = tensors(tmp_path / "dense")
    assert all(one in stored for module in report for one in module.tensor.split(", "))
    assert all((tmp_path / "dense" / one).is_file() for module in report for one in module.file.split(", "))

    mixture("gpt_oss").save_pretrained(tmp_path / "stacked")
    report = prune_checkpoint(tmp_path / "stacked", tmp_path / "out", **request)
    expert = report["model.layers.0.mlp.experts.down_proj.1"]
    assert expert.tensor == "model.layers.0.mlp.experts.down_proj"
    assert expert.shape == (24, 32)  # inputs first, as it is stored


def test_some_experts_alone_leave_the_others_as_they_are(tmp_path: Path) -> None:
    dense = mixture("mixtral")
    dense.save_pretrained(tmp_path / "dense")
    for targets, pruned in (
        (["gate_up_proj.2"], {"2.w1.weight", "2.w3.weight"}),
        (["experts.down_proj"], {f"{index}.w2.weight" for index in range(4)}),
    ):
        request = {"pattern": "2:4", "calibration": batches(), "target_modules": targets, "overwrite": True}
        prune_checkpoint(tmp_path / "dense", tmp_path / "out", **request)
        before, after = tensors(tmp_path / "dense"), tensors(tmp_path / "out")
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert {name.rpartition(".experts.")[2] for name in changed} == pruned
        model = type(dense).from_pretrained(tmp_path / "dense")
        prune_wanda(model, batches(), pattern="2:4", target_modules=targets)
        model.save_pretrained(tmp_path / "expected")
        assert differing(tmp_path / "out", tmp_path / "expected") == []


def test_a_base_model_s_checkpoint_is_pruned_as_the_whole_model_reads_it(tmp_path: Path) -> None:
    """Without the prefix that the names have in the whole model, also where tensors are taken apart."""
    dense = mixture("qwen3_moe")
    dense.model.save_pretrained(tmp_path / "dense")
    config = tmp_path / "dense" / "config.json"
    config.write_text(config.read_text().replace("Qwen3MoeModel", "Qwen3MoeForCausalLM"))
    prune_checkpoint(tmp_path / "dense", tmp_path / "out", pattern="2:4", calibration=batches())
    prune_wanda(dense, batches(), pattern="2:4")
    dense.model.save_pretrained(tmp_path / "expected")
    assert differing(tmp_path / "out", tmp_path / "expected") == []


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "olmoe"])
def test_a_skeleton_makes_the_experts_of_from_pretrained(tmp_path: Path, kind: str) -> None:
    dense = mixture(kind, torch.bfloat16)
    dense.save_pretrained(tmp_path)
    skeleton = Skeleton(read_checkpoint(tmp_path), torch.device("cpu"))
    for name, parameter in dense.named_parameters():
        with skeleton.loaded([name]):
            assert torch.equal(skeleton.model.get_parameter(name), parameter), name
        assert skeleton.model.get_parameter(name).is_meta


class NoWayBack(Concatenate):
    @property
    def reverse_op(self):
        raise NotImplementedError("no way back")


class AnotherShape(Concatenate):
    @property
    def reverse_op(self):
        return Chunk(dim=2)


class OtherValues(Concatenate):
    @property
    def reverse_op(self):
        return Swapped(dim=self.dim)


class Swapped(Chunk):
    def convert(self, *args, **kwargs):
        made = super().convert(*args, **kwargs)
        return dict(zip(made, reversed(made.values()), strict=True))


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (NoWayBack, "no way back"),
        (AnotherShape, r"there is no model\.layers\.0\S+experts\.0\.w1\.weight in it"),
        (OtherValues, r"model\.layers\.0\S+experts\.0\.w1\.weight would change"),
    ],
)
def test_what_cannot_be_taken_apart_is_refused_by_name_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: type, message: str
) -> None:
    mixture("mixtral").save_pretrained(tmp_path / "dense")
    mapping = conversion_mapping.get_checkpoint_conversion_mapping("mixtral")
    for one in mapping:
        if isinstance(one, WeightConverter):
            one.operations = [operation(op.dim) if isinstance(op, Concatenate) else op for op in one.operations]
    monkeypatch.setitem(conversion_mapping._checkpoint_conversion_mapping_cache, "mixtral", mapping)
    with pytest.raises(
        ValueError, match=rf"0\.mlp\.experts\.gate_up_proj cannot be taken apart again: {message}\. Load"
    ):
        prune_checkpoint(tmp_path / "dense", tmp_path / "out", method="magnitude", pattern="2:4")
    assert not (tmp_path / "out").exists()


def test_a_missing_expert_is_refused_by_name(tmp_path: Path) -> None:
    mixture("mixtral").save_pretrained(tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    left = {name: one for name, one in load_file(file).items() if "layers.1.block_sparse_moe.experts.2.w3" not in name}
    save_file(left, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"gate_up_proj"):
        prune_checkpoint(tmp_path / "dense", tmp_path / "out", method="magnitude", pattern="2:4")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:Fewer than 16 calibration tokens")
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_one_block_of_a_mixture_is_in_memory_at_a_time(tmp_path: Path, method: str) -> None:
    peaks, sizes = [], []
    for layers in (2, 6):
        folder = tmp_path / str(layers)
        tiny_moe("mixtral", num_hidden_layers=layers, hidden_size=128, intermediate_size=256).save_pretrained(
            folder, max_shard_size="700KB"
        )
        sizes.append(sum(tensor.nbytes for tensor in tensors(folder).values()))
        request = {
            "method": method,
            "pattern": "2:4",
            "calibration": [torch.randint(0, 64, (1, 16)) for _ in range(3)],
        }
        peaks.append(
            peak_of_tensors(
                lambda folder=folder, request=request: prune_checkpoint(folder, f"{folder}-out", **request)
            )
        )
    block = (sizes[1] - sizes[0]) // 4
    assert peaks[1] - peaks[0] < block // 5, (peaks, block)
    assert peaks[1] < 3.5 * block, (peaks, block)


def test_a_pruned_mixture_can_be_compressed(tmp_path: Path) -> None:
    dense = mixture("mixtral", torch.bfloat16)
    dense.save_pretrained(tmp_path / "dense")
    request = {"method": "magnitude", "pattern": "2:4"}
    prune_checkpoint(tmp_path / "dense", tmp_path / "out", **request)
    prune_checkpoint(tmp_path / "dense", tmp_path / "small", compress=True, **request)
    one, other = (type(dense).from_pretrained(tmp_path / name, dtype=torch.bfloat16) for name in ("out", "small"))
    with torch.no_grad():
        torch.testing.assert_close(other(batches()[0]).logits, one(batches()[0]).logits)


def test_experts_in_a_matrix_stay_dense_with_a_warning(tmp_path: Path) -> None:
    """DBRX has its experts one below another."""
    build("dbrx").save_pretrained(tmp_path / "dense")
    with pytest.warns(UserWarning, match=r"6 weights in the blocks, such as \S+experts\S+, .* stay dense"):
        report = prune_checkpoint(tmp_path / "dense", tmp_path / "out", method="magnitude", pattern="2:4")
    assert not any("experts" in name for name in report.modules)
