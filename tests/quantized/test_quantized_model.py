# SPDX-License-Identifier: Apache-2.0
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from peft_spp import SPPConfig
from peft_spp.sparsity import compare_sparsity
from peft_spp.tuner.quantized import QuantizedLinear, dequantized_weight, find_backend

from helpers.quantized_cases import equal_bits, load_quantized, packed_bits, pruned_llama, quantized
from helpers.tiny import randomize


KINDS = (
    "nf4-double",
    "int8",
    "torchao-int8",
    pytest.param("nf4", marks=pytest.mark.slow),
    pytest.param("fp4", marks=pytest.mark.slow),
)
pytestmark = pytest.mark.filterwarnings("ignore:Merge spp module", "ignore:.*inputs will be cast")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    pruned_llama().save_pretrained(path)
    return path


def ids(batch=2, length=9):
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(0))


def spp_layers(model):
    return {m.module_name: m for m in model.modules() if isinstance(m, QuantizedLinear)}


def train(model, steps=6, lr=0.05):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_default_targets_are_all_quantized_layers_of_the_blocks(checkpoint, kind):
    model = get_peft_model(load_quantized(checkpoint, kind), SPPConfig(r=4, task_type="CAUSAL_LM"))
    assert len(spp_layers(model)) == 14
    assert {p.dtype for n, p in model.named_parameters() if ".spp_" in n} == {torch.float32}


@pytest.mark.parametrize("reentrant", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_kbit_training_with_gradient_checkpointing(checkpoint, kind, reentrant):
    base = load_quantized(checkpoint, kind)
    base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model = get_peft_model(base, SPPConfig(r=4, task_type="CAUSAL_LM", spp_dropout=0.05)).train()
    before = {name: packed_bits(layer.get_base_layer()) for name, layer in spp_layers(model).items()}
    losses = train(model)
    assert losses[-1] < losses[0] - 0.1
    for name, layer in spp_layers(model).items():
        assert layer.spp_B["default"].weight.any()
        assert equal_bits(before[name], packed_bits(layer.get_base_layer()))


@pytest.mark.parametrize("kind", ["nf4-double", "int8", "torchao-int8"])
def test_gradients_with_and_without_checkpointing_are_equal(checkpoint, kind):
    grads = []
    for checkpointing in (False, True):
        model = get_peft_model(load_quantized(checkpoint, kind), SPPConfig(r=4, task_type="CAUSAL_LM"))
        torch.manual_seed(0)
        randomize(model, 0.1)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()(input_ids=ids(), labels=ids()).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_gives_the_same_logits(checkpoint, kind, tmp_path):
    model = get_peft_model(load_quantized(checkpoint, kind), SPPConfig(r=4, task_type="CAUSAL_LM")).eval()
    randomize(model, 0.2)
    model.add_adapter("second", SPPConfig(r=3, target_modules=["q_proj", "down_proj"]))
    randomize(model, 0.2, "second")
    logits = {}
    with torch.no_grad():
        for name in ("default", "second"):
            model.set_adapter(name)
            logits[name] = model(ids()).logits
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(load_quantized(checkpoint, kind), tmp_path).eval()
        again.load_adapter(tmp_path / "second", "second")
        for name, expected in logits.items():
            again.set_adapter(name)
            assert torch.equal(again(ids()).logits, expected)
        mixed = again(ids(), adapter_names=["second", "default"]).logits
    tolerance = {"rtol": 0.1, "atol": 0.1} if kind == "int8" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(mixed[0], logits["second"][0], **tolerance)
    torch.testing.assert_close(mixed[1], logits["default"][1], **tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_quantized_model_saves_and_loads_and_is_as_sparse(checkpoint, kind, tmp_path):
    base = load_quantized(checkpoint, kind)
    zeros = {name: dequantized_weight(m) == 0 for name, m in base.named_modules() if find_backend(m)}
    model = get_peft_model(base, SPPConfig(r=4, task_type="CAUSAL_LM"))
    randomize(model, 0.2)
    merged = model.merge_and_unload(safe_merge=True).eval()
    assert type(merged) is type(base) and merged.is_quantized
    merged.save_pretrained(tmp_path)
    again = load_quantized(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(ids()).logits, merged(ids()).logits)
    assert len(zeros) == 14
    for name, zero in zeros.items():
        assert not dequantized_weight(again.get_submodule(name))[zero].any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_dequantized_merge_is_a_plain_checkpoint_with_all_zeros_of_the_base(checkpoint, kind, tmp_path):
    model = get_peft_model(load_quantized(checkpoint, kind), SPPConfig(r=4, task_type="CAUSAL_LM")).eval()
    randomize(model, 0.2)
    with torch.no_grad():
        expected = model(ids()).logits
        merged = model.merge_and_unload(safe_merge=True, dequantize=True)
        torch.testing.assert_close(merged(ids()).logits, expected, rtol=1e-4, atol=1e-5)
        merged.save_pretrained(tmp_path)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert not hasattr(plain.config, "quantization_config")
        torch.testing.assert_close(plain(ids()).logits, merged(ids()).logits)
    assert not any(find_backend(module) for module in plain.modules())
    assert compare_sparsity(checkpoint, tmp_path).kept


def test_a_dequantized_model_after_kbit_preparation_runs(checkpoint):
    base = prepare_model_for_kbit_training(load_quantized(checkpoint, "nf4").bfloat16())
    model = get_peft_model(base, SPPConfig(r=4, task_type="CAUSAL_LM")).eval()
    randomize(model, 0.1)
    with torch.no_grad():
        expected = model(ids()).logits
        actual = model.merge_and_unload(dequantize=True)(ids()).logits
    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao-int8"])
def test_generation(checkpoint, kind):
    model = get_peft_model(load_quantized(checkpoint, kind), SPPConfig(r=4, task_type="CAUSAL_LM")).eval()
    randomize(model, 0.2)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    generated = model.generate(input_ids=ids(), attention_mask=torch.ones(2, 9), **settings)
    with torch.no_grad():
        step_by_step = ids()
        for _ in range(generated.shape[1] - 9):
            next_ids = model(step_by_step).logits[:, -1].argmax(-1, keepdim=True)
            step_by_step = torch.cat([step_by_step, next_ids], dim=1)
    assert torch.equal(generated, step_by_step)


def test_hqq_layers_in_a_model_train(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in name:
            model.set_submodule(name, quantized("hqq", module))
    model = get_peft_model(model, SPPConfig(r=4, task_type="CAUSAL_LM")).train()
    assert len(spp_layers(model)) == 14
    losses = train(model)
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_the_float_base_finds_its_masks_refined(checkpoint, kind, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint), SPPConfig(r=4, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*with different masks")
        loaded = PeftModel.from_pretrained(load_quantized(checkpoint, kind), tmp_path)
    relations = set(loaded.base_model.relate_base().values())
    # FP4 rounds few weights to zero: none in some layers
    assert relations <= {"refined", "same"} and "refined" in relations


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_a_quantized_base_records_it_and_loads_onto_the_float_base(checkpoint, kind, tmp_path):
    model = get_peft_model(load_quantized(checkpoint, kind), SPPConfig(r=4, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*with different masks")
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), tmp_path)
        again = PeftModel.from_pretrained(load_quantized(checkpoint, kind), tmp_path)
    recorded = loaded.peft_config["default"].base_record.quantization
    package, _, form = recorded.partition(" ")
    assert package == ("torchao" if kind == "torchao-int8" else "bitsandbytes")
    assert (
        form
        == {
            "nf4": "nf4",
            "nf4-double": "nf4 with double quantization",
            "fp4": "fp4",
            "int8": "int8",
            "torchao-int8": "Int8Tensor",
        }[kind]
    )
    assert set(again.base_model.relate_base().values()) == {"same"}


def test_a_quantized_base_with_other_masks_is_told(checkpoint, tmp_path):
    get_peft_model(load_quantized(checkpoint, "nf4"), SPPConfig(r=4, task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    other = pruned_llama()
    for name, weight in other.named_parameters():
        if ".layers." in name and weight.dim() == 2:
            weight.data = weight.data.roll(1, dims=1)
    with pytest.warns(UserWarning, match="bitsandbytes nf4 then, None now"):
        PeftModel.from_pretrained(other, tmp_path)


def test_hqq_has_lost_the_masks_and_a_warning_says_so(checkpoint, tmp_path):
    get_peft_model(pruned_llama(), SPPConfig(r=4, task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    base = pruned_llama()
    for name, module in list(base.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in name:
            base.set_submodule(name, quantized("hqq", module))
    with pytest.warns(UserWarning, match="hqq 4 bits now"):
        PeftModel.from_pretrained(base, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4-double", "int8", "torchao-int8"])
def test_sft_trainer(checkpoint, kind, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    base = load_quantized(checkpoint, kind)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_letters(), pad_token="<pad>", eos_token="</s>")
    trainer = SFTTrainer(
        model=base,
        args=SFTConfig(
            output_dir=tmp_path,
            max_steps=8,
            per_device_train_batch_size=4,
            learning_rate=0.05,
            gradient_checkpointing=True,
            report_to=[],
            logging_steps=1,
            save_steps=8,
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=Dataset.from_dict({"text": ["a b c d e f g h"] * 32}),
        processing_class=tokenizer,
        peft_config=SPPConfig(r=4, task_type="CAUSAL_LM"),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    trained = trainer.model.eval()
    loaded = PeftModel.from_pretrained(load_quantized(checkpoint, kind), tmp_path / "checkpoint-8").eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids()).logits, trained(ids()).logits)


def _letters():
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{letter: i for i, letter in enumerate("abcdefgh", 3)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer
