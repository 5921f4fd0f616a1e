# SPDX-License-Identifier: Apache-2.0
import functools
import math
import subprocess
import sys

import pytest
import torch
from peft import get_peft_model
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_spp import SPPConfig, SPPGuardCallback
from peft_spp.sparsity import compare_sparsity, sparsity_report

from helpers.tiny import block_linears, is_positive_zero, prune_, tiny_llama
from helpers.tiny_moe import PARAMETERS, tiny_moe


class Tokens(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        ids = torch.randint(0, 64, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


class At(TrainerCallback):
    """Does something to the model after a step, before the guard looks."""

    def __init__(self, step, change):
        self.step, self.change = step, change

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                self.change(model)


def pruned_llama(dtype=torch.float32, **settings):
    model = tiny_llama(**settings)
    for layer in block_linears(model).values():
        prune_(layer.weight, "2:4")
    return model.to(dtype)


def train(tmp_path, *callbacks, steps=4, guard=None, model=None, config=None, **settings):
    model = model or get_peft_model(pruned_llama(), config or SPPConfig(r=4, task_type="CAUSAL_LM"))
    defaults = {
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=steps, **{**defaults, **settings})
    trainer = Trainer(model, arguments, train_dataset=Tokens(), callbacks=[*callbacks, guard or SPPGuardCallback()])
    trainer.train()
    return trainer


def layer_of(model, name="model.layers.1.mlp.up_proj"):
    return model.get_submodule(f"base_model.model.{name}")


def test_a_sound_run_is_left_alone(tmp_path):
    trainer = train(tmp_path, guard=SPPGuardCallback(check_base_steps=1), save_strategy="steps", save_steps=2)
    assert trainer.state.global_step == 4
    assert (tmp_path / "checkpoint-4" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part", ["spp_A", "spp_B"])
def test_a_factor_that_is_not_finite_is_named_after_its_step_and_not_saved(tmp_path, part, value):
    def spoil(model):
        getattr(layer_of(model), part)["default"].weight.view(-1)[3] = value

    with pytest.raises(RuntimeError, match=rf"\b3\b.*layers\.1\.mlp\.up_proj\.{part}\.default"):
        train(tmp_path, At(3, spoil), save_strategy="steps", save_steps=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]


def test_large_factors_are_finite(tmp_path):
    def enlarge(model):
        layer_of(model).spp_B["default"].weight.fill_(3e38)  # a sum of their squares is not
        layer_of(model).spp_A["default"].weight.fill_(0.0)

    train(tmp_path, At(4, enlarge), steps=4)


def test_whatever_is_trained_is_watched(tmp_path):
    config = SPPConfig(r=4, task_type="CAUSAL_LM", modules_to_save=["lm_head"])

    def spoil(model):
        model.base_model.model.lm_head.modules_to_save["default"].weight[0, 0] = math.nan

    with pytest.raises(RuntimeError, match=r"\b2\b.*lm_head"):
        train(tmp_path, At(2, spoil), config=config)


def fill_a_zero(weight):
    weight[tuple((weight == 0).nonzero()[0])] = 1e-3


def make_a_zero(weight):
    weight[tuple(weight.nonzero()[0])] = 0.0


def change_a_value(weight):
    weight[tuple(weight.nonzero()[0])] *= 2


@pytest.mark.parametrize("change", [fill_a_zero, make_a_zero, change_a_value])
def test_a_base_weight_that_changes_in_place_is_named_after_its_step(tmp_path, change):
    # long before the next check of all weights
    with pytest.raises(RuntimeError, match=r"\b3\b.*model\.layers\.1\.mlp\.up_proj"):
        train(tmp_path, At(3, lambda model: change(layer_of(model).base_layer.weight)), steps=6)


@pytest.mark.parametrize("change", [fill_a_zero, make_a_zero, change_a_value])
def test_a_change_that_pytorch_does_not_count_is_found_at_the_next_check(tmp_path, change):
    def behind(model):
        change(layer_of(model).base_layer.weight.data)

    with pytest.raises(RuntimeError, match=r"\b4\b.*model\.layers\.1\.mlp\.up_proj"):
        train(tmp_path, At(3, behind), steps=6, guard=SPPGuardCallback(check_base_steps=2))


@pytest.mark.parametrize("strategy", [{"save_strategy": "steps", "save_steps": 4}, {"save_strategy": "epoch"}])
def test_a_changed_base_is_found_before_saving(tmp_path, strategy):
    steps = 4 if "save_steps" in strategy else 32  # an epoch

    def behind(model):
        fill_a_zero(layer_of(model).base_layer.weight.data)

    with pytest.raises(RuntimeError, match=rf"\b{steps}\b.*up_proj"):
        train(tmp_path, At(3, behind), steps=40, guard=SPPGuardCallback(check_base_steps=0), **strategy)
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("change", [fill_a_zero, make_a_zero, lambda weight: weight.mul_(2)])
def test_the_weights_of_experts_are_watched(tmp_path, change):
    base = tiny_moe("gpt_oss", pattern="2:4")
    config = SPPConfig(r=4, task_type="CAUSAL_LM", target_modules=[], target_parameters=PARAMETERS)

    def spoil(model):
        change(model.base_model.model.model.layers[1].mlp.experts.get_base_layer().down_proj)

    with pytest.raises(RuntimeError, match=r"\b2\b.*layers\.1\.mlp\.experts\.down_proj"):
        train(tmp_path, At(2, spoil), model=get_peft_model(base, config), guard=SPPGuardCallback(check_base_steps=0))


def test_weights_that_cannot_be_seen_are_told(tmp_path):
    model = get_peft_model(pruned_llama(), SPPConfig(r=4, task_type="CAUSAL_LM"))
    layer_of(model).base_layer.to("meta")
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    with pytest.warns(UserWarning, match=r"1 modules, such as model\.layers\.1\.mlp\.up_proj"):
        SPPGuardCallback().on_train_begin(arguments, TrainerState(), TrainerControl(), model=model)


def test_a_changed_base_is_found_at_the_end(tmp_path):
    def behind(model):
        fill_a_zero(layer_of(model).base_layer.weight.data)

    with pytest.raises(RuntimeError, match=r"\b4\b.*up_proj"):
        train(tmp_path, At(3, behind), guard=SPPGuardCallback(check_base_steps=0))


def test_a_base_that_is_trained_too_may_change_but_not_in_its_zeros(tmp_path):
    model = get_peft_model(pruned_llama(), SPPConfig(r=4, task_type="CAUSAL_LM"))
    layer_of(model).base_layer.weight.requires_grad_(True)
    layer_of(model).base_layer.weight.register_hook(lambda grad: grad * (layer_of(model).base_layer.weight != 0))
    train(tmp_path, model=model, guard=SPPGuardCallback(check_base_steps=1))
    layer_of(model).base_layer.weight._backward_hooks.clear()
    with pytest.raises(RuntimeError, match=r"\b1\b.*up_proj"):
        train(tmp_path, model=model)


def test_a_model_without_spp_is_refused(tmp_path):
    with pytest.raises(ValueError, match="SPP"):
        train(tmp_path, model=tiny_llama())


def test_a_negative_interval_is_refused():
    with pytest.raises(ValueError, match="-1"):
        SPPGuardCallback(check_base_steps=-1)


def test_one_guard_serves_several_runs(tmp_path):
    guard = SPPGuardCallback(check_base_steps=1)
    for seed in range(2):
        model = get_peft_model(pruned_llama(seed=seed), SPPConfig(r=4, task_type="CAUSAL_LM"))
        train(tmp_path, model=model, guard=guard)


def test_importing_the_package_does_not_import_the_callback():
    code = "import sys, peft_spp; assert 'peft_spp.callbacks' not in sys.modules; peft_spp.SPPGuardCallback"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_with_trl(tmp_path):
    from trl import SFTConfig, SFTTrainer

    class Ids(Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return {"input_ids": [1, 2, 3, 4, 5 + index], "labels": [1, 2, 3, 4, 5 + index]}

    pytest.importorskip("datasets")
    import datasets

    def spoil(model):
        layer_of(model).spp_B["default"].weight[0] = math.nan

    arguments = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=3,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        per_device_train_batch_size=2,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=get_peft_model(pruned_llama(), SPPConfig(r=4, task_type="CAUSAL_LM")),
        args=arguments,
        train_dataset=datasets.Dataset.from_list([Ids()[index] for index in range(8)]),
        processing_class=tokenizer(),
        callbacks=[At(2, spoil), SPPGuardCallback()],
    )
    with pytest.raises(RuntimeError, match=r"\b2\b.*up_proj\.spp_B"):
        trainer.train()


def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"t{index}": index for index in range(64)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="t1", pad_token="t2", unk_token="t0")


class Losses(TrainerCallback):
    def __init__(self):
        self.values = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.values.append(logs["loss"])


def bf16_base():
    return pruned_llama(torch.bfloat16), {}


def bf16_autocast():
    return pruned_llama(), {"bf16": True}


def fp16_autocast():
    """CPU's own gradient scaler does not come with the trainer: the forward pass runs in float16 autocast."""
    model = pruned_llama()
    forward = model.forward

    @functools.wraps(forward)  # the trainer reads the names of the arguments
    def in_autocast(*args, **kwargs):
        with torch.autocast("cpu", dtype=torch.float16):
            return forward(*args, **kwargs)

    model.forward = in_autocast
    return model, {}


@pytest.mark.slow
@pytest.mark.parametrize("base", [bf16_base, bf16_autocast, fp16_autocast])
def test_2000_steps_at_a_high_learning_rate(tmp_path, base):
    model, settings = base()
    before = {name: layer.weight.detach().clone() for name, layer in block_linears(model).items()}
    model = get_peft_model(model, SPPConfig(r=4, task_type="CAUSAL_LM"))
    losses = Losses()
    trainer = train(
        tmp_path,
        losses,
        model=model,
        steps=2000,
        learning_rate=4e-2,
        logging_strategy="steps",
        logging_steps=100,
        logging_nan_inf_filter=False,
        **settings,
    )
    assert trainer.state.global_step == 2000
    # nothing that is not finite went unnoticed: neither a factor, which the guard tells, nor a loss
    assert len(losses.values) == 20 and all(math.isfinite(loss) for loss in losses.values)
    assert losses.values[-1] < losses.values[0]
    assert all(p.isfinite().all() for p in model.parameters())
    merged = model.merge_and_unload(safe_merge=True)
    for name, layer in block_linears(merged).items():
        assert is_positive_zero(layer.weight[before[name] == 0]).all()
    assert sparsity_report(merged, patterns=("2:4",)).all_satisfy("2:4")
    assert compare_sparsity({f"{name}.weight": weight for name, weight in before.items()}, merged).lost == 0


@pytest.mark.slow
@pytest.mark.parametrize("base", [bf16_base, fp16_autocast])
def test_a_run_that_diverges_is_stopped_and_its_zeros_are_sound(tmp_path, base):
    model, settings = base()
    before = {name: layer.weight.detach().clone() for name, layer in block_linears(model).items()}
    model = get_peft_model(model, SPPConfig(r=4, task_type="CAUSAL_LM"))
    with pytest.raises(RuntimeError, match=r"spp_[AB]\.default"):
        train(tmp_path, model=model, steps=2000, learning_rate=1e37, max_grad_norm=0.0, optim="sgd", **settings)
    for name, layer in block_linears(model).items():
        assert torch.equal(layer.weight, before[name])
    for name, layer in block_linears(model.merge_and_unload()).items():
        assert is_positive_zero(layer.weight[before[name] == 0]).all()
