# SPDX-License-Identifier: Apache-2.0
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_spp.checkpoints.checkpoint import read_checkpoint
from peft_spp.pruning import prune_checkpoint, prune_magnitude, prune_wanda
from peft_spp.pruning.skeleton import Skeleton
from peft_spp.sparsity import compare_sparsity, sparsity_report

from helpers.every_model import build
from helpers.tiny import tiny


# tables of positions, inverse frequencies, slopes, relative biases, buffers that a checkpoint holds
KINDS = [
    *("gptj", "codegen", "gpt_neox", "llama", "gemma2", "gemma3_text", "phi3", "cohere", "bloom", "mpt", "falcon"),
    *("opt", "gpt2", "gpt_neo", "qwen2_moe", "deepseek_v3", "glm4_moe", "xglm", "biogpt", "bert", "t5"),
    # parameters that do not follow the default device
    *("diffllama", "xlnet", "imagegpt"),
]


def saved(folder: Path, kind: str, dtype: torch.dtype) -> tuple[Path, type]:
    rotary = {"vocab_size": 160, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4}
    classes = {"gptj": "GPTJForCausalLM", "codegen": "CodeGenForCausalLM"}
    model = (tiny(classes[kind], **rotary) if kind in classes else build(kind)).to(dtype)
    for name, buffer in model.named_buffers():
        if name in model.state_dict() and buffer.is_floating_point():
            buffer.uniform_()  # what is in the checkpoint is not what the class computes
    model.save_pretrained(folder)
    return folder, type(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_those_of_from_pretrained_bit_for_bit(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    folder, cls = saved(tmp_path, kind, dtype)
    expected = cls.from_pretrained(folder, dtype=dtype)
    skeleton = Skeleton(read_checkpoint(folder), torch.device("cpu"))
    buffers = dict(skeleton.model.named_buffers())
    assert buffers.keys() == dict(expected.named_buffers()).keys()
    checked = 0
    for name, tensor in (*expected.named_buffers(), *expected.named_parameters()):
        try:
            skeleton.load(name)
        except ValueError as error:  # fused tensors, which are refused where they are needed
            assert "Transformers builds from other tensors" in str(error)
            continue
        actual = skeleton.model.get_parameter_or_buffer(name)
        assert actual.dtype == tensor.dtype, name
        assert torch.equal(actual, tensor), name
        checked += 1
    assert checked > 10


@pytest.mark.parametrize("kind", ["diffllama", "xlnet", "imagegpt"])
def test_parameters_that_do_not_follow_the_default_device_are_read_from_disk(tmp_path: Path, kind: str) -> None:
    folder, cls = saved(tmp_path / "dense", kind, torch.float32)
    batches = [torch.arange(3, 35).reshape(2, 16) + shift for shift in range(2)]
    prune_checkpoint(folder, tmp_path / "out", pattern="2:4", calibration=batches)
    expected = cls.from_pretrained(folder)
    prune_wanda(expected, batches, pattern="2:4")
    actual = cls.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("disk", [False, True])
def test_a_model_that_cannot_be_called_in_its_dtype_is_refused_with_the_reason(tmp_path: Path, disk: bool) -> None:
    folder, cls = saved(tmp_path / "dense", "xlnet", torch.bfloat16)
    batches = [torch.arange(3, 35).reshape(2, 16)]
    model = cls.from_pretrained(folder, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="expected scalar type"):
        model(batches[0])  # Transformers makes some of its weights in float32
    before = {name: one.clone() for name, one in model.state_dict().items()}
    message = r"XLNet\w*Model, .*bfloat16 and float32, cannot be called .*: expected scalar type .* float32 only"
    with pytest.raises(ValueError, match=message):
        if disk:
            prune_checkpoint(folder, tmp_path / "out", pattern="2:4", calibration=batches)
        else:
            prune_wanda(model, batches, pattern="2:4")
    assert not (tmp_path / "out").exists()
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["gptj", "codegen", "bloom"])
def test_masks_from_disk_in_half_precision_are_those_in_memory(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    folder, cls = saved(tmp_path / "dense", kind, dtype)
    batches = [torch.randint(3, 80, (2, 48), generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    prune_checkpoint(folder, tmp_path / "out", pattern="2:4", calibration=batches)
    model = cls.from_pretrained(folder, dtype=dtype)
    prune_wanda(model, batches, pattern="2:4")
    model.save_pretrained(tmp_path / "expected")
    actual, expected = tensors(tmp_path / "out"), tensors(tmp_path / "expected")
    assert actual.keys() == expected.keys()
    assert [name for name in actual if not torch.equal(actual[name], expected[name])] == []


def test_a_layer_that_transformers_loads_in_float32_is_refused_by_name(tmp_path: Path) -> None:
    """T5 keeps wo in float32 where the rest is in float16."""
    folder, _ = saved(tmp_path / "dense", "t5", torch.float16)
    halves = {name: tensor.half() for name, tensor in tensors(folder).items()}
    save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"wo.weight.*Transformers loads it in torch.float32.*exclude_modules"):
        prune_checkpoint(folder, tmp_path / "out", method="magnitude", pattern="2:4")
    report = prune_checkpoint(folder, tmp_path / "out", method="magnitude", pattern="2:4", exclude_modules=["wo"])
    assert report.sparsity == 0.5


def test_both_stacks_of_an_encoder_decoder_model_are_pruned_by_magnitude(tmp_path: Path) -> None:
    """As its refusal by the other methods advises, from disk and in memory."""
    folder, cls = saved(tmp_path / "dense", "t5", torch.float32)
    data = [torch.zeros(1, 4, dtype=torch.long)]
    for targets in (None, ["q"]):
        with pytest.raises(ValueError, match=r"Only magnitude pruning works for this model"):
            prune_checkpoint(folder, tmp_path / "out", pattern="2:4", calibration=data, target_modules=targets)
        with pytest.raises(ValueError, match=r"Only magnitude pruning works for this model"):
            prune_wanda(cls.from_pretrained(folder), data, pattern="2:4", target_modules=targets)
    report = prune_checkpoint(folder, tmp_path / "out", method="magnitude", pattern="2:4")
    assert {name.split(".")[0] for name in report.modules} == {"encoder", "decoder"}
    model = cls.from_pretrained(folder)
    prune_magnitude(model, pattern="2:4")
    model.save_pretrained(tmp_path / "expected")
    actual, expected = tensors(tmp_path / "out"), tensors(tmp_path / "expected")
    assert [name for name in actual if not torch.equal(actual[name], expected[name])] == []


MIXTURES = {
    "qwen2_moe": {"gate", "shared_expert_gate"},
    "llama4_text": {"router"},
    "phimoe": {"router"},
    "qwen3_next": {"gate", "shared_expert_gate"},
    "granitemoe": {"router"},
    "deepseek_v3": {"gate"},
}


@pytest.mark.parametrize("kind", MIXTURES)
def test_routers_stay_dense_and_the_reports_agree(tmp_path: Path, kind: str) -> None:
    folder, cls = saved(tmp_path / "dense", kind, torch.float32)
    report = prune_checkpoint(folder, tmp_path / "out", method="magnitude", pattern="2:4")
    model = cls.from_pretrained(folder)
    prune_magnitude(model, pattern="2:4")
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.nn.Parameter) and set(name.split(".")) & MIXTURES[kind]:
            assert (weight != 0).all(), name
            assert torch.equal(weight, cls.from_pretrained(tmp_path / "out").get_submodule(name).weight), name
    found = sparsity_report(tmp_path / "out")
    stored = {tensor.removesuffix(".weight") for one in report for tensor in one.tensor.split(", ")}
    assert {one.name for one in found if one.zeros} == stored
    in_memory = {re.sub(r"(\.experts\.\w+)\.\d+$", r"\1", name) for name in report.modules}
    assert {one.name for one in sparsity_report(model) if one.zeros} == in_memory
    assert compare_sparsity(tmp_path / "out", tmp_path / "out").kept
