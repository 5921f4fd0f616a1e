# SPDX-License-Identifier: Apache-2.0
"""Plans of folders with a config.json alone: mixtures, dtypes, compressed models, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import BertConfig, GPT2Config, LlamaConfig, RobertaConfig
from typer.testing import CliRunner

import peft_spp
from peft_spp import SPPConfig
from peft_spp.cli import app
from peft_spp.planning import plan_checkpoint, plan_training
from peft_spp.pruning import prune_magnitude

from helpers.tiny import LLAMA, tiny_llama
from helpers.tiny_moe import MOE, PARAMETERS, tiny_moe


def run(*arguments: object):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def refused(message: str, *arguments: object) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and message in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    LlamaConfig(**LLAMA, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    return tmp_path


def change(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def sizes(model: torch.nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("name", sorted(MOE))
def test_experts_count_as_compress_stores_them(name):
    model = tiny_moe(name, hidden_size=64).to(torch.bfloat16)
    on_meta = tiny_moe(name, hidden_size=64).to(torch.bfloat16).to("meta")
    dense = plan_training(tiny_moe(name, hidden_size=64).to(torch.bfloat16).to("meta"), sequence=16)
    plan = plan_training(on_meta, sequence=16, sparsity=0.75)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 3:  # exactly three quarters of zeros
                parameter.view(-1).fill_(1.0)[torch.arange(parameter.numel()) % 4 > 0] = 0
    prune_magnitude(model, sparsity=0.75, target_modules=r".*self_attn\.\w_proj")
    peft_spp.compress(model)
    assert plan.weights == pytest.approx(sizes(model), rel=0.01) and plan.weights < dense.weights
    assert plan.experts == dense.experts > 0
    assert f"Experts with {plan.experts:,} parameters are not adapted." in str(plan)


@pytest.mark.parametrize("name", sorted(MOE))
def test_the_command_plans_adapters_of_experts(tmp_path: Path, name):
    model = tiny_moe(name, hidden_size=64)
    model.config.architectures = [MOE[name][0]]
    model.config.save_pretrained(tmp_path)
    options = ["--target-parameters", PARAMETERS[0], "--target-parameters", PARAMETERS[1], "--r", 4, "--sequence", 16]
    adapted = get_peft_model(model, SPPConfig(r=4, target_parameters=PARAMETERS))
    for more in ([], ["--compressed", "--sparsity", "0.75", "--gradient-checkpointing"]):
        found = json.loads(run(tmp_path, *options, *more, "--json").stdout)
        assert found["trainable"] == sum(one.numel() for one in adapted.parameters() if one.requires_grad)
        assert found["experts"] == 0
    refused("has no parameter 'no_such'", tmp_path, *options, "--target-parameters", "no_such")


def test_a_model_without_experts_has_none_to_name(folder: Path):
    assert "experts" not in run(folder, "--sequence", 16).stdout


@pytest.mark.parametrize("architectures", [None, ["NoSuchModel"], ["LlamaForCausalLM"]])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_dtype_is_that_of_the_option(folder: Path, architectures, dtype):
    change(folder, architectures=architectures, dtype="bfloat16")
    found = json.loads(run(folder, "--sequence", 16, "--dtype", dtype, "--json").stdout)
    assert found["dtype"] == dtype
    assert found["weights"] >= found["parameters"] * getattr(torch, dtype).itemsize


def test_a_compressed_model_is_planned_compressed(folder: Path):
    dense = plan_checkpoint(folder, sequence=16)
    change(folder, quantization_config={"quant_method": "bitmask"})
    refused("is compressed, and config.json does not have its share of zeros", folder, "--sequence", 16)
    refused("--compressed --sparsity", folder, "--sequence", 16)
    shown = run(folder, "--sequence", 16, "--compressed", "--sparsity", 0.9, "--json")
    assert json.loads(shown.stdout)["weights"] < dense.weights


@pytest.mark.parametrize(("name", "value"), [("min_sparsity", "a"), ("modules_to_not_convert", 5)])
def test_settings_of_a_compressed_model_of_another_kind_are_named(folder: Path, name, value):
    change(folder, quantization_config={"quant_method": "bitmask", name: value})
    refused(f"{name} must be", folder, "--sequence", 16, "--compressed", "--sparsity", 0.9)


def test_layers_that_a_compressed_model_leaves_dense_are_planned_dense(folder: Path):
    def weights(**quantization: object) -> int:
        change(folder, quantization_config={"quant_method": "bitmask", "version": 1, **quantization})
        return plan_checkpoint(folder, sequence=16, sparsity=0.75).weights

    model = tiny_llama().to(torch.bfloat16)
    prune_magnitude(model, sparsity=0.75)
    peft_spp.compress(model, modules_to_not_convert=["lm_head", "down_proj"])
    assert weights(modules_to_not_convert=["lm_head", "down_proj"]) == pytest.approx(sizes(model), rel=0.01)
    assert weights(modules_to_not_convert=["lm_head", "down_proj"]) > weights() > weights(modules_to_not_convert=[])
    assert weights(min_sparsity=0.8) == plan_checkpoint_dense(folder)
    change(folder, quantization_config={"quant_method": "bitmask", "version": 2})
    refused("compressed in version 2", folder, "--compressed", "--sequence", 16)


def plan_checkpoint_dense(folder: Path) -> int:
    change(folder, quantization_config=None)
    return plan_checkpoint(folder, sequence=16).weights


def test_sparsity_without_compressed_is_refused(folder: Path):
    refused("--sparsity 0.9 does nothing without --compressed: add it", folder, "--sparsity", 0.9)


def test_null_is_no_quantization(folder: Path):
    change(folder, quantization_config=None)
    assert run(folder, "--sequence", 16).exit_code == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "config.json holds no JSON object"),
        ('{"model_type": ', "config.json is not valid JSON"),
        ('{"model_type": "llama", "quantization_config": [1]}', "quantization_config=[1] in"),
        ('{"model_type": "llama", "hidden_size": "many"}', "config.json: "),
        ('{"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}', "config.json: "),
        ('{"model_type": "no_such"}', "config.json: "),
    ],
)
def test_a_broken_configuration_is_one_line(tmp_path: Path, content, message):
    (tmp_path / "config.json").write_text(content)
    refused(message, tmp_path)


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "LlamaModel"])
def test_models_of_other_tasks_are_named(tmp_path: Path, name):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = (BertConfig if name.startswith("Bert") else LlamaConfig)(**sizes, vocab_size=64, architectures=[name])
    config.save_pretrained(tmp_path)
    refused(f"a training step of {name} cannot be followed", tmp_path, "--sequence", 16)


def test_a_sequence_is_not_longer_than_the_learned_positions(tmp_path: Path):
    GPT2Config(
        n_positions=32, n_embd=32, n_layer=2, n_head=4, vocab_size=64, architectures=["GPT2LMHeadModel"]
    ).save_pretrained(tmp_path)
    refused("sequence=33 is more than the 32 positions that transformer.wpe", tmp_path, "--sequence", 33)
    assert run(tmp_path, "--sequence", 32).exit_code == 0


def test_positions_that_padding_takes_do_not_count(tmp_path: Path):
    """RoBERTa counts from the position after that of padding, so a table of 66 has 64."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    RobertaConfig(
        **sizes,
        vocab_size=64,
        max_position_embeddings=66,
        pad_token_id=1,
        is_decoder=True,
        architectures=["RobertaForCausalLM"],
    ).save_pretrained(tmp_path)
    refused("sequence=65 is more than the 64 positions that roberta.embeddings", tmp_path, "--sequence", 65)
    assert run(tmp_path, "--sequence", 64).exit_code == 0


def test_rotary_positions_have_no_end(folder: Path):
    assert run(folder, "--sequence", 2 * LLAMA["max_position_embeddings"]).exit_code == 0


@pytest.mark.parametrize("setting", ["gpus", "batch", "sequence"])
@pytest.mark.parametrize("value", [0, -1])
def test_numbers_are_positive(setting, value):
    with pytest.raises(ValueError, match=f"{setting}={value} is not positive"):
        plan_training(tiny_llama().to("meta"), **{setting: value})


@pytest.mark.parametrize(("option", "value"), [("--device-memory", "1.2.3GB"), ("--device-tflops", "inf")])
def test_numbers_of_the_gpu_are_numbers(folder: Path, option, value):
    refused(f"{option} {value} is not", folder, option, value)


def test_a_folder_without_a_model_is_told_by_what_it_holds(folder: Path):
    (folder / "config.json").rename(folder / "adapter_config.json")
    assert "has no config.json, but an adapter: pass the model that it is for" in run(folder).stderr
    (folder / "adapter_config.json").unlink()
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "model.safetensors").touch()
    assert f"has no config.json. Pass {folder / 'checkpoint-5'}" in run(folder).stderr
