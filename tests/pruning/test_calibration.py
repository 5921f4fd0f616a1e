# SPDX-License-Identifier: Apache-2.0
"""Calibration in memory, block by block: caches, state, randomness, and blocks that cannot be run again."""

import copy
import re
from typing import Any

import pytest
import torch
import transformers
from plain_wanda import SEED, assert_plain_wanda, in_float64, plain_wanda, weights_of
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from peft_spp.pruning import prune_sparsegpt, prune_wanda
from peft_spp.pruning.block_calls import entering_states
from peft_spp.pruning.calibration import enter_blocks
from peft_spp.pruning.calibration_data import calibration_inputs
from peft_spp.pruning.calibration_mode import calibration_mode
from peft_spp.pruning.layers import prunable_layers
from peft_spp.sparsity import satisfies_n_m

from helpers.every_model import build, tiny_config
from helpers.mixtures import tiny_llama4
from helpers.tiny import tiny_llama


def tiny_qwen3_5() -> nn.Module:
    return transformers.Qwen3_5ForConditionalGeneration(tiny_config("qwen3_5"))


MULTIMODAL = {
    "qwen3_vl": lambda: build("qwen3_vl"),
    "gemma3": lambda: build("gemma3"),
    "llama4": tiny_llama4,
    "qwen3_5": tiny_qwen3_5,
}


def two_batches(vocab_size: int = 80) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 80, (2, 12), generator=generator) % vocab_size for _ in range(2)]


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
        prune_wanda(model, two_batches(64), pattern="2:4")
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[name]), name


@pytest.mark.parametrize("prune_by_data", [prune_wanda, prune_sparsegpt])
def test_blocks_get_what_pruned_blocks_give_where_autocast_has_cached_the_dense_weights(prune_by_data) -> None:
    models = [tiny_llama() for _ in range(2)]
    for model, is_cached in zip(models, (True, False), strict=True):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=is_cached), torch.no_grad():
            prune_by_data(model, two_batches(64), pattern="1:4")
            output = model(two_batches(64)[0]).logits
            torch.clear_autocast_cache()
            assert torch.equal(output, model(two_batches(64)[0]).logits)
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[name]), name


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
        prune_wanda(model, two_batches(64), pattern="2:4")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


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
    prune_wanda(model, two_batches(64), pattern="2:4")
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
    prune_wanda(model, two_batches(64), pattern="2:4")
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
