# SPDX-License-Identifier: Apache-2.0
"""Plans against measured memory, and against arithmetic by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from typer.testing import CliRunner


pytest.importorskip("matplotlib")

from benchmarks.planning import LARGE, PAGE, SMALL, Small, llama, measure, measure_model, plan_of
from peft_spp.checkpoints.empty_model import default_dtype
from peft_spp.cli import app
from peft_spp.planning import plan_checkpoint, plan_training

from helpers.tiny import tiny, tiny_llama
from helpers.tiny_moe import tiny_moe


ROOT = Path(__file__).parents[2]
TINY = Small(
    {
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
    },
    batch=2,
    sequence=192,
)
MIXTURE = Small(
    {**TINY.settings, "intermediate_size": 192, "num_local_experts": 4, "num_experts_per_tok": 2},
    batch=2,
    sequence=192,
    experts=("experts.gate_up_proj", "experts.down_proj"),
)


def on_meta(settings=TINY.settings, dtype=torch.bfloat16) -> LlamaForCausalLM:
    return llama(settings, dtype, "meta")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("sparsity", [None, 0.5, 0.75])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plan_is_what_a_step_takes_within_a_percent(dtype, sparsity, checkpointing):
    measured = measure(TINY, dtype, sparsity, checkpointing)
    assert plan_of(TINY, dtype, sparsity, checkpointing).total == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("sparsity", [None, 0.5])
@pytest.mark.parametrize("experts", [MIXTURE.experts, MIXTURE.experts[1:]])
def test_so_is_the_plan_of_experts(experts, sparsity, checkpointing):
    """Which tokens go to which experts is not known before: a plan spreads them evenly."""
    small = replace(MIXTURE, experts=experts)
    plan = plan_of(small, torch.bfloat16, sparsity, checkpointing)
    assert plan.total == pytest.approx(measure(small, torch.bfloat16, sparsity, checkpointing), rel=0.05)
    stack = 2 * 4 * 128 * 192  # of two layers
    assert plan.experts == (0 if experts == MIXTURE.experts else 2 * stack)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("sparsity", [None, 0.5])
@pytest.mark.parametrize("name", list(SMALL))
def test_larger_plans_are_what_a_step_takes(name, sparsity, checkpointing):
    measured = measure(SMALL[name], torch.bfloat16, sparsity, checkpointing)
    within = 0.05 if SMALL[name].experts else 0.01
    assert plan_of(SMALL[name], torch.bfloat16, sparsity, checkpointing).total == pytest.approx(measured, rel=within)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_so_is_the_plan_of_a_model_whose_attention_has_a_mask(dtype, checkpointing):
    """That of a sliding window is one of truth values, of which each layer makes numbers."""
    config = MistralConfig(**TINY.settings, sliding_window=32, use_cache=False)
    with default_dtype(dtype), torch.device("meta"):
        on_meta = MistralForCausalLM(config)
    with default_dtype(dtype):
        model = MistralForCausalLM(config)
    settings = {"batch": TINY.batch, "sequence": 512, "gradient_checkpointing": checkpointing}
    plan = plan_training(on_meta, on_cpu=True, **settings)
    taken = measure_model(model, None, TINY.batch, 512, checkpointing)
    assert plan.total == pytest.approx(taken, rel=0.01)


def test_dropout_in_attention_is_not_planned_for_a_cpu():
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=32))
    with pytest.raises(ValueError, match=r"no fused attention with dropout \(0\.1\).* dropout to 0"):
        plan_training(model, sequence=16, on_cpu=True)
    assert plan_training(model, sequence=16).total > 0


def test_the_operations_are_those_of_the_matmuls_and_of_attention():
    settings, tokens, sequence = TINY.settings, 384, 192
    hidden, inner, heads = settings["hidden_size"], settings["intermediate_size"], settings["num_attention_heads"]
    kept = hidden // heads * settings["num_key_value_heads"]
    in_blocks = 2 * (2 * hidden * hidden + 2 * hidden * kept + 3 * hidden * inner)
    pairs = 2 * (4 * tokens * sequence * hidden)  # forward: scores and values, in two blocks
    head = 2 * tokens * hidden * settings["vocab_size"]
    forward = 2 * tokens * in_blocks + pairs
    # forward, the gradient of x, that of W'; the first layers of the model have no x that needs one
    first = 2 * tokens * (hidden * hidden + 2 * hidden * kept)
    expected = 3 * 2 * tokens * in_blocks - first + pairs + 5 * pairs // 2 + 2 * head
    assert plan_training(on_meta(), batch=2, sequence=sequence).flops == expected
    again = plan_training(on_meta(), batch=2, sequence=sequence, gradient_checkpointing=True)
    # PEFT makes the embeddings need a gradient then
    assert again.flops == expected + first + forward


def test_engines_share_what_they_shard():
    one = plan_training(on_meta())
    ddp, fsdp2, zero2, zero3 = (plan_training(on_meta(), gpus=8, engine=e) for e in ("ddp", "fsdp2", "zero2", "zero3"))
    assert (one.gathered, ddp.gathered, zero2.gathered) == (0, 0, 0)
    assert ddp.weights == zero2.weights == one.weights and ddp.step - one.step == one.factors
    assert zero2.optimizer == 3 * one.factors // 8 and one.optimizer == 2 * one.factors
    buffers = sum(t.untyped_storage().nbytes() for t in on_meta().buffers())
    assert fsdp2.weights == (one.weights - buffers) // 8 + buffers
    model = on_meta()
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    outside = sum(p.numel() for p in model.parameters()) - 2 * block
    assert fsdp2.gathered == 2 * (outside + 2 * block)
    assert zero3.gathered == one.weights - buffers  # a tiny model has less than DeepSpeed keeps gathered
    assert (fsdp2.factors, fsdp2.optimizer) == (one.factors // 8, 2 * one.factors // 8)


def test_a_mixture_is_planned_with_its_experts():
    model = tiny_moe("mixtral")
    expected = sum(p.numel() * 2 for p in model.parameters())
    plan = plan_training(model.to(torch.bfloat16).to("meta"), sequence=16)
    assert expected <= plan.weights < 1.02 * expected and plan.flops > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": "zero1"}, "'zero1' is not one of 'ddp', 'fsdp2', 'zero2', 'zero3'"),
        ({"sparsity": 1.0}, "sparsity=1.0 is not between 0 and 1"),
        ({"sparsity": 0.5, "gpus": 2, "engine": "zero3"}, "'zero3' cannot shard compressed weights: use 'fsdp2'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        plan_training(on_meta(), **settings)


def test_a_model_that_cannot_be_planned_is_named():
    with pytest.raises(ValueError, match="LlamaForCausalLM has data: make it under"):
        plan_training(tiny_llama())
    model = tiny("XLMWithLMHeadModel", vocab_size=64, emb_dim=32, n_layers=1, n_heads=2, max_position_embeddings=64)
    with pytest.raises(ValueError, match="XLMWithLMHeadModel cannot be followed without data"):
        plan_training(model.to("meta"), sequence=16)


def run(*arguments: object):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = on_meta().config
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    return tmp_path


def test_the_command_needs_no_weights(folder: Path):
    shown = run(folder, "--device-memory", "1MB", "--sequence", 128)
    plan = plan_checkpoint(folder, sequence=128)
    assert shown.exit_code == 0, shown.output
    assert "Computed, not measured." in shown.stdout and "more than" in shown.stdout
    assert "on one GPU, 1 × 128 tokens, without gradient checkpointing" in shown.stdout
    found = json.loads(
        run(
            folder, "--sequence", 128, "--json", "--device-tflops", 100, "--utilization", 0.5, "--dtype", "bfloat16"
        ).stdout
    )
    assert {key: found[key] for key in plan.to_dict()} == plan.to_dict()
    assert found["total"] == plan.total and found["seconds"] == pytest.approx(plan.flops / 50e12)


def test_the_options_of_the_command_reach_the_plan(folder: Path):
    arguments = ("--gpus", 8, "--engine", "fsdp2", "--compressed", "--sparsity", 0.75, "--gradient-checkpointing")
    arguments += ("--r", 8, "--batch", 2, "--target-modules", "q_proj", "--dtype", "float16", "--sequence", 64)
    found = json.loads(run(folder, *arguments, "--json").stdout)
    assert (found["gpus"], found["engine"], found["sparsity"], found["batch"]) == (8, "fsdp2", 0.75, 2)
    assert found["gradient_checkpointing"] and found["dtype"] == "float16"
    assert found["trainable"] == 2 * (8 * 128 + 128)
    assert "gathered" in run(folder, *arguments).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device-memory", "80"], "--device-memory 80 is not a number with one of GB, GiB, MB, MiB"),
        (["--compressed", "--gpus", "2", "--engine", "zero3"], "cannot shard compressed weights"),
        (["--target-modules", "no_such"], "no_such"),
        (
            ["--target-modules", "q_proj", "--target-modules", "v_porj"],
            "target_modules: LlamaForCausalLM has no module 'v_porj'",
        ),
    ],
)
def test_a_refusal_is_one_line(folder: Path, arguments, message):
    result = run(folder, *arguments)
    assert result.exit_code == 2 and message in result.stderr and "Traceback" not in result.stderr


def test_all_linear_is_the_shorthand_of_peft(folder: Path):
    linear = [name for name, module in on_meta().named_modules() if isinstance(module, torch.nn.Linear)]
    named = [one for name in linear if name != "lm_head" for one in ("--target-modules", name)]
    short, long = (
        run(folder, "--sequence", 64, "--json", *one) for one in (["--target-modules", "all-linear"], named)
    )
    assert short.exit_code == 0, short.output
    assert json.loads(short.stdout) == json.loads(long.stdout)


def test_models_that_are_no_dense_model_are_refused(folder: Path, tmp_path: Path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    assert "is quantized (gptq)" in run(folder).stderr
    (folder / "config.json").unlink()
    assert "has no config.json" in run(folder).stderr


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_page_has_the_plan_of_an_8b_model(checkpointing):
    plan = plan_training(llama(LARGE["8B"], torch.bfloat16, "meta"), gradient_checkpointing=checkpointing)
    rows = [
        line.split("|")[1:-1]
        for line in (ROOT / PAGE).read_text().splitlines()
        if line.startswith("| 8B, one GPU | dense ")
    ]
    cells = [cell.strip() for cell in rows[0]]
    assert (
        cells[3 + checkpointing] == f"{plan.step / 1e9:.1f}" and cells[5 + checkpointing] == f"{plan.total / 1e9:.1f}"
    )
