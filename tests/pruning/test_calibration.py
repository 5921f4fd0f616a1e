# SPDX-License-Identifier: Apache-2.0
import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from plain_wanda import SEED, plain_wanda, weights_of
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from transformers import DynamicCache

from peft_spp.pruning import prune_checkpoint, prune_sparsegpt, prune_wanda
from peft_spp.pruning.block_calls import entering_states
from peft_spp.pruning.calibration import enter_blocks
from peft_spp.pruning.calibration_data import calibration_inputs
from peft_spp.pruning.calibration_mode import calibration_mode
from peft_spp.pruning.layers import find_target_layers, prunable_layers
from peft_spp.sparsity import satisfies_n_m

from helpers.every_model import build, tiny_config
from helpers.tiny import tiny_llama


def in_float64(model: nn.Module) -> nn.Module:
    """With weights so large that attention matters, and experts in the one way that runs in float64."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3) if parameter.ndim > 1 else None
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model.double()


def tiny_llama4() -> nn.Module:
    text = {"hidden_size": 32, "intermediate_size": 48, "intermediate_size_mlp": 48, "num_hidden_layers": 3}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 160, "pad_token_id": 0}
    text |= {"num_local_experts": 4, "num_experts_per_tok": 1, "max_position_embeddings": 64}
    vision = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32, "image_size": 28}
    config = transformers.Llama4Config(text_config=text, vision_config=vision)
    return transformers.Llama4ForConditionalGeneration(config)


def tiny_qwen3_5() -> nn.Module:
    return transformers.Qwen3_5ForConditionalGeneration(tiny_config("qwen3_5"))


MULTIMODAL = {
    "qwen3_vl": lambda: build("qwen3_vl"),
    "gemma3": lambda: build("gemma3"),
    "llama4": tiny_llama4,
    "qwen3_5": tiny_qwen3_5,
}


def two_batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 80, (2, 12), generator=generator) for _ in range(2)]


def assert_plain_wanda(
    model: nn.Module, batches: list[Any], sequences: list[dict[str, Any]], excluded: list[str] | None = None
) -> None:
    """Prune `model` on the batches: each weight has to be what plain Wanda makes of the sequences."""
    dense = copy.deepcopy(model)
    prune_wanda(model, batches, pattern="2:4", exclude_modules=excluded)
    names = list(find_target_layers(model, None, excluded))
    expected, pruned = plain_wanda(dense, names, sequences), weights_of(model, names)
    assert [name for name in names if not torch.equal(pruned[name], expected[name])] == []


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_no_cache_however_deep_its_setting_is_nested(kind: str) -> None:
    model = in_float64(MULTIMODAL[kind]())
    assert model.config.get_text_config().use_cache
    assert_plain_wanda(model, two_batches(), [{"input_ids": batch} for batch in two_batches()])
    assert model.config.get_text_config().use_cache


def test_cache_settings_and_training_are_restored_after_an_error() -> None:
    model = build("qwen3_vl").train()
    model.lm_head.eval()
    with pytest.raises(RuntimeError, match="inside"), calibration_mode(model):
        configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
        assert not any(getattr(config, "use_cache", False) for config in configs.values()) and not model.training
        raise RuntimeError("inside")
    assert model.config.text_config.use_cache and model.training and not model.lm_head.training


def test_a_model_that_asks_for_dropout_gives_the_same_masks_in_training() -> None:
    models = [tiny_llama(attention_dropout=0.5) for _ in range(2)]
    models[0].train()
    for model in models:
        prune_wanda(model, two_batches_of_64(), pattern="2:4")
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[name]), name


def two_batches_of_64() -> list[torch.Tensor]:
    return [batch % 64 for batch in two_batches()]


class Remembers(nn.Module):
    """Adds what it got in its last call, as a cache of a state would."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Any = 0.0

    def forward(self, block: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        output, self.last = output + self.last, output.detach()
        return output


def remembers(model: nn.Module) -> None:
    model.model.layers[1].register_forward_hook(Remembers())


def draws_at_random(model: nn.Module) -> None:
    model.model.layers[1].register_forward_hook(lambda block, args, output: output * torch.rand(()))


def passes_outputs_on(model: nn.Module) -> None:
    found: list[torch.Tensor] = []
    model.model.layers[0].register_forward_hook(lambda block, args, output: found.append(output))

    def add(block: nn.Module, args: tuple, kwargs: dict) -> tuple:
        return args, {**kwargs, "attention_mask": found[-1][:, None, :, :1].expand(-1, -1, -1, args[0].shape[1])}

    model.model.layers[1].register_forward_pre_hook(add, with_kwargs=True)


def shares_a_layer(model: nn.Module) -> None:
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj


def shares_a_weight(model: nn.Module) -> None:
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight


def prunes_with_pytorch(model: nn.Module) -> None:
    prune.l1_unstructured(model.model.layers[1].mlp.up_proj, "weight", amount=0.5)


def computes_a_weight(model: nn.Module) -> None:
    parametrizations.weight_norm(model.model.layers[1].mlp.up_proj)


def runs_a_block_twice(model: nn.Module) -> None:
    model.model.layers = nn.ModuleList([model.model.layers[0], model.model.layers[0]])
    model.config.num_hidden_layers = 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remembers, "keep state between calls, or are random"),
        (draws_at_random, "keep state between calls, or are random"),
        (passes_outputs_on, "Block 1 takes an input that the model computes from the outputs of earlier blocks"),
        (runs_a_block_twice, "does not run each of its blocks once|shares its weight"),
        (shares_a_layer, r"model\.layers\.0\.mlp\.up_proj shares its weight with model\.layers\.1\.mlp\.up_proj"),
        (shares_a_weight, r"model\.layers\.0\.mlp\.up_proj shares its weight with model\.layers\.1\.mlp\.up_proj"),
        (computes_a_weight, r"model\.layers\.1\.mlp\.up_proj is computed from other tensors"),
        (prunes_with_pytorch, r"model\.layers\.1\.mlp\.up_proj is computed from other tensors"),
    ],
)
def test_blocks_that_cannot_be_run_again_are_refused(change, message: str) -> None:
    model = tiny_llama()
    change(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        prune_wanda(model, two_batches_of_64(), pattern="2:4")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


PADDED = {
    "llama": lambda: tiny_llama(),
    "opt": lambda: build("opt"),
    "gpt2": lambda: build("gpt2"),
    "bloom": lambda: build("bloom"),
    "qwen2_moe": lambda: build("qwen2_moe"),
    "deepseek_v3": lambda: build("deepseek_v3"),
    "llama4": tiny_llama4,
    "mixtral": lambda: build("mixtral"),
    "bert": lambda: build("bert"),
    "gpt_neo": lambda: build("gpt_neo"),
    "phimoe": lambda: build("phimoe"),
}
LENGTHS = [(12, 9), (5, 12)]


def padded_batches(side: str) -> tuple[list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]:
    """Batches of two sequences with padding, and the sequences alone."""
    generator = torch.Generator().manual_seed(2)
    batches, sequences = [], []
    for lengths in LENGTHS:
        ids, mask = torch.full((2, 12), 7), torch.zeros(2, 12, dtype=torch.long)
        for row, length in enumerate(lengths):
            tokens = torch.randint(3, 60, (length,), generator=generator)
            place = slice(12 - length, 12) if side == "left" else slice(length)
            ids[row, place], mask[row, place] = tokens, 1
            sequences.append({"input_ids": tokens[None]})
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches, sequences


@pytest.mark.parametrize("kind", PADDED)
def test_padding_does_not_count_whatever_the_shape_of_a_layers_inputs(kind: str) -> None:
    batches, sequences = padded_batches("right")
    assert_plain_wanda(in_float64(PADDED[kind]()), batches, sequences)


def test_padding_does_not_count_in_the_states_of_mamba() -> None:
    """Mamba reads the weight of dt_proj without calling it, so there is nothing to measure."""
    batches, sequences = padded_batches("right")
    model = in_float64(build("mamba"))
    with pytest.raises(ValueError, match=r"reached .*dt_proj.*with exclude_modules"):
        prune_wanda(model, batches, pattern="2:4")
    assert_plain_wanda(model, batches, sequences, excluded=["dt_proj"])


@pytest.mark.parametrize("kind", ["llama", "opt", "bloom", "deepseek_v3", "llama4"])
def test_padding_on_the_left_does_not_count_either(kind: str) -> None:
    batches, sequences = padded_batches("left")
    assert_plain_wanda(in_float64(PADDED[kind]()), batches, sequences)


def test_tokens_keep_the_positions_that_padding_on_the_left_gives_them() -> None:
    """GPT-2 counts positions from the start of the padding unless it is given position_ids."""
    batches, sequences = padded_batches("left")
    shifted = [
        sequence | {"position_ids": torch.arange(12 - length, 12)[None]}
        for sequence, length in zip(sequences, [length for pair in LENGTHS for length in pair], strict=True)
    ]
    assert_plain_wanda(in_float64(build("gpt2")), batches, shifted)
    from_zero = [{**batch, "position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)} for batch in batches]
    assert_plain_wanda(in_float64(build("gpt2")), from_zero, sequences)


def test_positions_that_cannot_be_kept_are_refused() -> None:
    model = in_float64(build("gpt2"))
    forward = model.forward

    def without_position_ids(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return forward(input_ids=input_ids, attention_mask=attention_mask)

    model.forward = without_position_ids
    with pytest.raises(ValueError, match="Left padding changes the output of GPT2LMHeadModel"):
        prune_wanda(model, padded_batches("left")[0], pattern="2:4")
    prune_wanda(model, padded_batches("right")[0], pattern="2:4")


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, 60, shape)


NO_TOKENS = torch.zeros(2, 12, dtype=torch.long)
HOLE = torch.tensor([[1] * 5 + [0] + [1] * 6, [1] * 12])
SHORT = torch.tensor([[1] * 12, [1] * 5 + [0] * 7])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": ids(2, 12), "attention_mask": NO_TOKENS}, "attention_mask marks all tokens as padding"),
        ({"input_ids": ids(2, 0)}, "no calibration data"),
        ({"input_ids": ids(2, 12), "attention_mask": HOLE}, "batch 1 has padding between the tokens of sequence 0"),
        ({"input_ids": ids(2, 12), "attention_mask": torch.ones(2, 1, 12, 12)}, r"batch 1 \(shape \(2, 1, 12, 12\)\)"),
        ({"input_ids": ids(2, 12), "attention_mask": {"full": SHORT}}, r"batch 1 \(dict\) does not mark"),
        ({"input_ids": ids(2, 12), "attention_mask": -SHORT}, "does not mark which tokens are padding"),
        ({"input_ids": ids(2, 12), "attention_mask": SHORT[:, :8]}, r"shape \(2, 8\), and input_ids has \(2, 12\)"),
        (
            {"input_ids": ids(2, 12), "attention_mask": SHORT, "pixel_values": torch.rand(3, 3, 8, 8)},
            r"batch 1 has padding, and its pixel_values \(shape \(3, 3, 8, 8\)\) cannot be split",
        ),
        ({"input_ids": ids(2, 12), "past_key_values": DynamicCache()}, "batch 1 contains past_key_values"),
        ({"input_ids": ids(2, 12), "memory": DynamicCache()}, "batch 1 contains memory"),
    ],
)
@pytest.mark.parametrize("prune_it", [prune_wanda, prune_sparsegpt])
def test_data_that_cannot_be_used_is_refused_and_the_model_stays_dense(prune_it, batch: dict, message: str) -> None:
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        prune_it(model, [batch], pattern="2:4")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_refusals_of_padding_advise_works() -> None:
    for batch in (
        {"input_ids": ids(1, 12)},
        {"input_ids": ids(2, 12), "attention_mask": SHORT},
        {"input_ids": ids(2, 12), "attention_mask": SHORT, "use_cache": True, "labels": ids(2, 12)},
    ):
        prune_wanda(tiny_llama(), [batch], pattern="2:4")


def test_how_batches_are_divided() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]])
    tokens = torch.arange(20).view(5, 4)
    embeds, positions = torch.rand(5, 4, 3), torch.arange(60).view(3, 5, 4)
    batch = {"input_ids": tokens, "attention_mask": mask, "inputs_embeds": embeds, "position_ids": positions}
    first, second, third = calibration_inputs([batch])
    assert first.arguments["input_ids"].tolist() == [[0, 1], [12, 13]] and first.padded is None
    assert torch.equal(first.arguments["inputs_embeds"], embeds[[0, 3], :2])
    assert torch.equal(first.arguments["position_ids"], positions[:, [0, 3], :2])
    assert second.arguments["input_ids"].tolist() == [[9, 10, 11]] and second.padded is not None
    assert third.arguments["input_ids"].tolist() == [[16, 17, 18, 19]]
    assert all((part.arguments["attention_mask"] == 1).all() for part in (first, second, third))
    whole = {"input_ids": tokens, "attention_mask": torch.ones_like(mask)}
    (same,) = calibration_inputs([whole])
    assert same.arguments["input_ids"] is tokens


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["opt", "gpt2"])
def test_padding_from_disk_is_treated_as_in_memory(tmp_path: Path, kind: str, side: str) -> None:
    model, batches = build(kind), padded_batches(side)[0]
    model.save_pretrained(tmp_path / "dense")
    steps: list[tuple[int, int]] = []
    prune_checkpoint(
        tmp_path / "dense",
        tmp_path / "out",
        pattern="2:4",
        calibration=batches,
        progress=lambda done, total: steps.append((done, total)),
    )
    prune_wanda(model, batches, pattern="2:4")
    pruned = type(model).from_pretrained(tmp_path / "out")
    for name, value in model.state_dict().items():
        assert torch.equal(value, pruned.state_dict()[name]), name
    # each parameter is looked at, one sequence passes two blocks, and each of the four enters and passes them twice
    total = len(list(model.parameters())) + 2 + 4 * (1 + 2 * 2)
    assert steps == [(number, total) for number in range(1, total + 1)]


def test_checks_take_no_random_numbers_from_a_model_that_draws_patches() -> None:
    model = in_float64(build("vit_mae"))
    generator = torch.Generator().manual_seed(1)
    batches = [{"pixel_values": torch.randn(2, 3, 64, 64, generator=generator).double()} for _ in range(3)]
    dense = copy.deepcopy(model)
    after = state_after_passes(dense, batches)
    torch.manual_seed(SEED)
    assert_plain_wanda(model, batches, batches)
    torch.manual_seed(SEED)
    prune_wanda(copy.deepcopy(dense), batches, pattern="2:4")
    assert torch.get_rng_state().equal(after)

    # from disk, the model is entered without its blocks
    torch.manual_seed(SEED)
    blocks = dense.layers
    entered = enter_blocks(
        dense, blocks, calibration_inputs(batches), torch.device("cpu"), lambda: blocks[0], lambda: None
    )
    assert torch.get_rng_state().equal(after)
    torch.manual_seed(SEED)
    for batch, one in zip(batches, entered, strict=True):
        assert torch.equal(entering_states(dense, blocks, batch), one.hidden_states)


def state_after_passes(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """The state of PyTorch's generator after a plain pass over the batches, which is left unchanged."""
    with torch.random.fork_rng([]), torch.no_grad():
        torch.manual_seed(SEED)
        for batch in batches:
            model(**batch)
        return torch.get_rng_state()


def test_computed_weights_can_be_made_parameters_first() -> None:
    model = tiny_llama()
    prunes_with_pytorch(model)
    parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)
    prune.remove(model.model.layers[1].mlp.up_proj, "weight")
    parametrize.remove_parametrizations(model.model.layers[0].mlp.up_proj, "weight")
    prune_wanda(model, two_batches_of_64(), pattern="2:4")
    assert all(satisfies_n_m(block.mlp.up_proj.weight, "2:4") for block in model.model.layers)


class CalledByAnotherName(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.mlp = block.mlp

    def forward(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        return x + scale * self.mlp(x)


def test_blocks_may_name_their_hidden_states_as_they_like() -> None:
    model = tiny_llama()
    model.model.layers = nn.ModuleList([CalledByAnotherName(block) for block in model.model.layers])
    inner = model.model

    def forward(input_ids: torch.Tensor) -> torch.Tensor:
        x = inner.embed_tokens(input_ids)
        for block in inner.layers:
            x = block(scale=0.5, x=x)
        return x

    model.forward = forward
    prune_wanda(model, two_batches_of_64(), pattern="2:4")
    assert {float((block.mlp.up_proj.weight == 0).float().mean()) for block in inner.layers} == {0.5}


@pytest.mark.parametrize("is_named", [False, True])
def test_the_text_model_is_pruned_where_another_stack_is_larger(is_named: bool) -> None:
    """Of GIT the larger stack is for images; text does not run through it."""
    model = in_float64(build("git"))
    names = [name for name in prunable_layers(model) if re.match(r"git\.encoder\.layer\.", name)]
    dense = copy.deepcopy(model)
    prune_wanda(model, two_batches(), pattern="2:4", target_modules=names if is_named else None)
    expected = plain_wanda(dense, names, [{"input_ids": batch} for batch in two_batches()])
    pruned = weights_of(model, names)
    assert len(names) == 12 and all(torch.equal(pruned[name], expected[name]) for name in names)
