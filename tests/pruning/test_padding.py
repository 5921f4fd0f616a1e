# SPDX-License-Identifier: Apache-2.0
"""Padding in calibration data: it does not count, and data that cannot be divided into its sequences is refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_wanda import assert_plain_wanda, in_float64
from transformers import BatchEncoding, DynamicCache

from peft_spp.pruning import prune_checkpoint, prune_sparsegpt, prune_wanda
from peft_spp.pruning.calibration_data import calibration_inputs

from helpers.every_model import build
from helpers.mixtures import tiny_llama4
from helpers.tiny import tiny_llama


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
        ("text", "batch 1 is a str. Pass a tensor"),
        ([[3, 4, 5, 6]], "batch 1 is a list. Pass a tensor"),
        (ids(2, 12).numpy(), "batch 1 is a ndarray. Pass a tensor"),
        ({"input_ids": [[3, 4, 5, 6]]}, r"input_ids of calibration batch 1 \(list\) .*return_tensors='pt'"),
        (ids(12), r"input_ids of calibration batch 1 \(shape \(12,\)\) .*input_ids\[None\]"),
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
def test_data_that_cannot_be_used_is_refused_and_the_model_stays_dense(prune_it, batch: Any, message: str) -> None:
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        prune_it(model, [batch], pattern="2:4")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("batch", [ids(2, 12), {"input_ids": ids(2, 12)}, BatchEncoding({"input_ids": ids(2, 12)})])
def test_a_batch_in_the_place_of_batches_is_refused_and_a_list_of_it_works(tmp_path: Path, batch: Any) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "dense")
    message = rf"calibration_batches is a {type(batch).__name__}, a single batch: .*\[batch\]"
    for prune_it in (prune_wanda, prune_sparsegpt):
        with pytest.raises(ValueError, match=message):
            prune_it(model, batch, pattern="2:4")
        prune_it(tiny_llama(), [batch], pattern="2:4")
    with pytest.raises(ValueError, match=message):
        prune_checkpoint(tmp_path / "dense", tmp_path / "out", pattern="2:4", calibration=batch)


def test_batches_may_be_in_one_tensor() -> None:
    assert [one.arguments["input_ids"].shape for one in calibration_inputs(ids(3, 2, 12))] == 3 * [(2, 12)]


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
