# SPDX-License-Identifier: Apache-2.0
"""Checkpoints pruned from disk to disk: the bits are those of pruning in memory, a block at a time."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_spp.demo.data import train_tokenizer
from peft_spp.pruning import prune_checkpoint, prune_magnitude, prune_sparsegpt, prune_wanda
from peft_spp.pruning.calibration_file import calibration_sequences
from peft_spp.sparsity import sparsity_report

from helpers.dense_checkpoints import SMALL, TEXT, edit_config, peak_of_tensors, save_model
from helpers.merge_cases import assert_same_bits, stored
from helpers.tiny import tiny, tiny_llama


IN_MEMORY = {"wanda": prune_wanda, "sparsegpt": prune_sparsegpt, "magnitude": prune_magnitude}


@pytest.mark.parametrize(
    ("kind", "method", "request_", "dtype"),
    [
        ("llama", "wanda", {"pattern": "2:4"}, torch.float32),
        ("llama", "wanda", {"sparsity": 0.6}, torch.bfloat16),
        ("llama", "sparsegpt", {"pattern": "2:4", "block_size": 8}, torch.float32),
        ("llama", "magnitude", {"sparsity": 0.5}, torch.bfloat16),
        ("gpt2", "wanda", {"pattern": "2:4"}, torch.float32),
        ("gpt2", "sparsegpt", {"sparsity": 0.75}, torch.float32),
        ("opt", "wanda", {"pattern": "4:8"}, torch.float32),
        ("neox", "wanda", {"pattern": "1:4"}, torch.bfloat16),
        ("gemma3", "wanda", {"pattern": "2:4"}, torch.bfloat16),
    ],
)
def test_the_bits_are_those_of_pruning_in_memory(
    tmp_path: Path, text: Path, kind: str, method: str, request_: dict, dtype: torch.dtype
) -> None:
    dense = save_model(tmp_path / "dense", kind, dtype)
    report = prune_checkpoint(dense, tmp_path / "out", method=method, calibration=text, **SMALL, **request_)

    loaded = AutoModelForCausalLM.from_pretrained(dense)
    data = calibration_sequences(text, AutoTokenizer.from_pretrained(dense), 4, 32, seed=0)
    IN_MEMORY[method](loaded, *([] if method == "magnitude" else [data]), **request_)
    loaded.save_pretrained(tmp_path / "expected", max_shard_size="40KB")
    assert_same_bits(stored(tmp_path / "out"), stored(tmp_path / "expected"))

    found = sparsity_report(tmp_path / "out", patterns=request_.get("pattern", "2:4"))
    assert report.zeros_after == found.zeros and {one.name for one in report} == {one.name for one in found}
    if "pattern" in request_:
        assert found.all_satisfy(request_["pattern"])


def test_what_belongs_to_the_model_stays_as_it_is(tmp_path: Path, model: Path) -> None:
    (model / "pytorch_model.bin").write_bytes(b"another format")
    (model / "generation_config.json").write_text('{"temperature": 0.5}')
    prune_checkpoint(model, tmp_path / "out", method="magnitude", pattern="2:4")
    before = {path.name: path for path in model.iterdir()}
    after = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert before.keys() - after.keys() == {"pytorch_model.bin"} and after.keys() - before.keys() == {"README.md"}
    for name, path in after.items():
        if path.suffix == ".safetensors":
            # the layout too: only bytes of pruned weights differ
            assert path.stat().st_size == before[name].stat().st_size
        elif name != "README.md":
            assert path.read_bytes() == before[name].read_bytes(), name
    dense, pruned = stored(model), stored(tmp_path / "out")
    untouched = {name for name in dense if ".layers." not in name or "norm" in name}
    assert_same_bits({name: pruned[name] for name in untouched}, {name: dense[name] for name in untouched})
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out").generate(torch.tensor([[5]]), max_new_tokens=2).numel()
    )


def test_the_card_keeps_what_it_says_and_tells_what_was_done(tmp_path: Path, model: Path, text: Path) -> None:
    (model / "README.md").write_text("---\nlicense: mit\ntags:\n- tiny\n---\n# My model\n\nIt is tiny.\n")
    prune_checkpoint(model, tmp_path / "out", pattern="2:4", calibration=text, seed=7, **SMALL)
    card = (tmp_path / "out" / "README.md").read_text()
    for part in ("license: mit", "- tiny", "- wanda", "# My model\n\nIt is tiny.", "2:4", "seed: 7", "text.txt"):
        assert part in card, part
    assert str(tmp_path) not in card
    assert "50.00%" in card


def test_modules_are_chosen_as_in_peft(tmp_path: Path, model: Path, text: Path) -> None:
    report = prune_checkpoint(
        model,
        tmp_path / "out",
        pattern="2:4",
        calibration=text,
        target_modules=["q_proj", "v_proj"],
        exclude_modules=r".*\.layers\.[12]\..*",
        **SMALL,
    )
    assert set(report.modules) == {f"model.layers.0.self_attn.{name}_proj" for name in "qv"}
    assert "lm_head" in report.left_dense and len(report.left_dense) == 20
    sparse = {name for name, tensor in stored(tmp_path / "out").items() if (tensor == 0).float().mean() > 0.4}
    assert sparse == {f"{name}.weight" for name in report.modules}


def test_a_body_saved_without_its_head_is_pruned_too(tmp_path: Path, model: Path, text: Path) -> None:
    body = AutoModelForCausalLM.from_pretrained(model).model
    body.save_pretrained(tmp_path / "body")
    edit_config(architectures=["LlamaForCausalLM"])(tmp_path / "body")
    data = calibration_sequences(text, AutoTokenizer.from_pretrained(model), 4, 32, seed=0)
    prune_checkpoint(tmp_path / "body", tmp_path / "out", pattern="2:4", calibration=data)
    prune_checkpoint(model, tmp_path / "whole", pattern="2:4", calibration=data)
    whole = stored(tmp_path / "whole")
    for name, tensor in stored(tmp_path / "out").items():
        assert torch.equal(tensor, whole[f"model.{name}"]), name


def test_a_config_that_says_that_nothing_is_quantized(tmp_path: Path, model: Path) -> None:
    edit_config(quantization_config=None)(model)
    assert prune_checkpoint(model, tmp_path / "out", method="magnitude", pattern="2:4").sparsity == 0.5


def test_a_dry_run_writes_nothing(tmp_path: Path, model: Path, text: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    report = prune_checkpoint(model, tmp_path / "out", pattern="2:4", calibration=text, dry_run=True, **SMALL)
    assert sorted(tmp_path.rglob("*")) == before
    assert report.dry_run and report.zeros_after is None and len(report) == 21 and "Would prune" in str(report)


def test_an_old_model_is_replaced_only_if_asked(tmp_path: Path, model: Path) -> None:
    prune_checkpoint(model, tmp_path / "out", method="magnitude", pattern="2:4")
    with pytest.raises(FileExistsError, match="not empty"):
        prune_checkpoint(model, tmp_path / "out", method="magnitude", pattern="1:4")
    prune_checkpoint(model, tmp_path / "out", method="magnitude", pattern="1:4", overwrite=True)
    assert sparsity_report(tmp_path / "out").total_sparsity == 0.75


def test_progress_ends_with_all_steps(tmp_path: Path, model: Path, text: Path) -> None:
    steps: list[tuple[int, int]] = []
    prune_checkpoint(
        model,
        tmp_path / "out",
        pattern="2:4",
        calibration=text,
        progress=lambda done, total: steps.append((done, total)),
        **SMALL,
    )
    assert [done for done, _ in steps] == list(range(1, steps[0][1] + 1)) and len({total for _, total in steps}) == 1


def test_documents_are_read_from_json_lines(tmp_path: Path, model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    documents = ["one text.", "another text, which is longer.", "a third."] * 10
    lines = "\n".join(json.dumps({"text": document, "id": 1}) for document in documents)
    (tmp_path / "texts.jsonl").write_text(lines + "\n\n")
    drawn = calibration_sequences(tmp_path / "texts.jsonl", tokenizer, 5, 16, seed=1)
    joined = [token for text in documents for token in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]
    sequences = [joined[start : start + 16] for start in range(0, len(joined) - 15, 16)]
    assert all(sequence.shape == (1, 16) and sequence[0].tolist() in sequences for sequence in drawn)
    assert len({tuple(sequence[0].tolist()) for sequence in drawn}) > 1
    again = calibration_sequences(tmp_path / "texts.jsonl", tokenizer, 5, 16, seed=1)
    other = calibration_sequences(tmp_path / "texts.jsonl", tokenizer, 5, 16, seed=2)
    assert all(torch.equal(one, two) for one, two in zip(drawn, again, strict=True))
    assert not all(torch.equal(one, two) for one, two in zip(drawn, other, strict=True))


@pytest.mark.parametrize(
    ("class_name", "settings", "sequence_length"),
    [
        ("RobertaForCausalLM", {"max_position_embeddings": 66, "pad_token_id": 1, "is_decoder": True}, 64),
        ("XLMRobertaForMaskedLM", {"max_position_embeddings": 66, "pad_token_id": 3}, 62),
        ("BertForMaskedLM", {"max_position_embeddings": 66, "pad_token_id": 1}, 66),
        ("MptForCausalLM", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 66}, 66),
        ("XLNetLMHeadModel", {"d_head": 8, "d_inner": 48}, 2048),  # its max_position_embeddings is -1
    ],
)
def test_sequences_are_as_long_as_the_model_can_take(
    tmp_path: Path, text: Path, class_name: str, settings: dict, sequence_length: int
) -> None:
    tokenizer = train_tokenizer([TEXT], vocab_size=300)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = tiny(class_name, vocab_size=len(tokenizer), **sizes, **settings)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "dense")
    request = {"pattern": "2:4", "calibration": text, "samples": 2}
    report = prune_checkpoint(tmp_path / "dense", tmp_path / "out", **request)
    assert report.settings["sequence_length"] == sequence_length
    if {"max_position_embeddings", "max_seq_len"} & set(settings):
        with pytest.raises(ValueError, match=f"exceeds the model's context of {sequence_length} tokens"):
            prune_checkpoint(tmp_path / "dense", tmp_path / "longer", **request, sequence_length=sequence_length + 1)
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, sequence_length + 1), 5))


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_one_block_is_in_memory_at_a_time(tmp_path: Path, method: str) -> None:
    peaks, sizes = [], []
    for layers in (2, 6):
        folder = tmp_path / str(layers)
        model = tiny_llama(num_hidden_layers=layers, hidden_size=128, intermediate_size=384)
        # headers are read of a whole file mapped into memory, which is counted though it takes none
        model.save_pretrained(folder, max_shard_size="700KB")
        sizes.append(sum(tensor.nbytes for tensor in stored(folder).values()))
        data = [torch.randint(0, 64, (1, 16)) for _ in range(3)]
        peaks.append(
            peak_of_tensors(
                lambda folder=folder, data=data: prune_checkpoint(
                    folder, f"{folder}-out", method=method, pattern="2:4", calibration=data
                )
            )
        )
    block = (sizes[1] - sizes[0]) // 4
    assert 0 < peaks[1] - peaks[0] + block // 10 < block // 5, (peaks, block)
    # the block itself, the scores and the mask of one of its weights, and the inputs
    assert peaks[1] < 2.5 * block
