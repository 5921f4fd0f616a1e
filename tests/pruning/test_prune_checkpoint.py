# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_spp.demo.data import train_tokenizer
from peft_spp.pruning import prune_checkpoint, prune_magnitude, prune_sparsegpt, prune_wanda
from peft_spp.pruning.calibration_file import calibration_sequences
from peft_spp.sparsity import sparsity_report

from helpers.tiny import tiny, tiny_llama


TEXT = " ".join(f"sentence {number} of the calibration text says {number * 7 % 13}." for number in range(400))
IN_MEMORY = {"wanda": prune_wanda, "sparsegpt": prune_sparsegpt, "magnitude": prune_magnitude}
MODELS = {
    "llama": ("LlamaForCausalLM", {"num_key_value_heads": 2}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "opt": (
        "OPTForCausalLM",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 48,
            "word_embed_proj_dim": 32,
        },
    ),
    "neox": (
        "GPTNeoXForCausalLM",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48},
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}


def save_model(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, **settings) -> Path:
    """A tiny dense model in shards, with a tokenizer and a generation config."""
    tokenizer = train_tokenizer([TEXT], vocab_size=300)
    class_name, kind_settings = MODELS[kind]
    common = {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0}
    make = tiny_llama if kind == "llama" else lambda **arguments: tiny(class_name, **arguments)
    model = make(**{**common, "pad_token_id": 1, **kind_settings, **settings}).to(dtype)
    model.save_pretrained(folder, max_shard_size="40KB")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(tmp_path / "dense")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


SMALL = {"samples": 4, "sequence_length": 32}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same_bits(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8)), name


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
    assert_same_bits(tensors(tmp_path / "out"), tensors(tmp_path / "expected"))

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
    dense, pruned = tensors(model), tensors(tmp_path / "out")
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
    sparse = {name for name, tensor in tensors(tmp_path / "out").items() if (tensor == 0).float().mean() > 0.4}
    assert sparse == {f"{name}.weight" for name in report.modules}


def test_a_body_saved_without_its_head_is_pruned_too(tmp_path: Path, model: Path, text: Path) -> None:
    body = AutoModelForCausalLM.from_pretrained(model).model
    body.save_pretrained(tmp_path / "body")
    edited = json.loads((tmp_path / "body" / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "body" / "config.json").write_text(json.dumps(edited))
    data = calibration_sequences(text, AutoTokenizer.from_pretrained(model), 4, 32, seed=0)
    prune_checkpoint(tmp_path / "body", tmp_path / "out", pattern="2:4", calibration=data)
    prune_checkpoint(model, tmp_path / "whole", pattern="2:4", calibration=data)
    whole = tensors(tmp_path / "whole")
    for name, tensor in tensors(tmp_path / "out").items():
        assert torch.equal(tensor, whole[f"model.{name}"]), name


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


def break_weight(model: Path) -> None:
    edit_tensor(
        model, "model.layers.1.mlp.up_proj.weight", lambda tensor: tensor.index_fill_(0, torch.tensor(3), torch.nan)
    )


def other_dtype(model: Path) -> None:
    edit_tensor(model, "model.layers.1.mlp.up_proj.weight", lambda tensor: tensor.half())


def rename_tensor(model: Path) -> None:
    index = json.loads((model / "model.safetensors.index.json").read_text())
    file = model / index["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    held = load_file(file)
    held["renamed"] = held.pop("model.layers.1.mlp.up_proj.weight")
    save_file(held, file, metadata={"format": "pt"})
    index["weight_map"]["renamed"] = index["weight_map"].pop("model.layers.1.mlp.up_proj.weight")
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def edit_tensor(model: Path, name: str, change) -> None:
    file = model / json.loads((model / "model.safetensors.index.json").read_text())["weight_map"][name]
    held = load_file(file)
    held[name] = change(held[name])
    save_file(held, file, metadata={"format": "pt"})


def edit_config(**changes):
    def edit(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | changes))

    return edit


def remove_tokenizer(model: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(
    ("break_model", "arguments", "message"),
    [
        (None, {"pattern": "4:2"}, "4:2"),
        (None, {"pattern": None, "sparsity": 1.5}, r"1\.5"),
        (None, {"sparsity": 0.5}, "exactly one"),
        (None, {"method": "obc"}, "'obc' is not one of 'wanda', 'magnitude', 'sparsegpt'"),
        (None, {"calibration": None}, "method='wanda' needs calibration data"),
        (None, {"calibration": Path("missing.txt")}, "the file 'missing.txt' does not exist"),
        (None, {"samples": 10_000}, "samples=10000"),
        (None, {"sequence_length": 65}, "65 exceeds the model's context of 64"),
        (None, {"target_modules": ["qkv"]}, "qkv"),
        (None, {"target_modules": ["lm_head"]}, "lm_head is outside the transformer blocks"),
        (None, {"exclude_modules": ".*"}, "excluded"),
        (None, {"pattern": "3:7"}, "32 input features of model.layers.0.self_attn.q_proj"),
        (None, {"method": "sparsegpt", "damping": -1}, "damping should be positive"),
        (break_weight, {}, r"'model\.layers\.1\.mlp\.up_proj\.weight' .* contains 32 NaN or infinite values"),
        (break_weight, {"dry_run": True}, r"'model\.layers\.1\.mlp\.up_proj\.weight' .* NaN or infinite"),
        (break_weight, {"method": "magnitude"}, r"'model\.layers\.1\.mlp\.up_proj\.weight' .* NaN or infinite"),
        (other_dtype, {}, "up_proj.*float16"),
        (rename_tensor, {}, "has no tensor 'model.layers.1.mlp.up_proj.weight'"),
        (remove_tokenizer, {}, "the tokenizer of"),
        (edit_config(model_type="nonsense", architectures=["Nonsense"]), {}, "nonsense"),
        (edit_config(quantization_config={"quant_method": "gptq"}), {}, "prune before quantizing"),
        (edit_config(intermediate_size=64), {}, "config.json implies"),
        (edit_config(num_hidden_layers=0), {}, "no transformer blocks"),
        (
            edit_config(tie_word_embeddings=True),
            {"method": "magnitude", "target_modules": ["lm_head"]},
            "lm_head shares",
        ),
    ],
)
def test_refusals_name_the_culprit_and_write_nothing(
    tmp_path: Path, model: Path, text: Path, break_model, arguments: dict, message: str
) -> None:
    if break_model is not None:
        break_model(model)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    wanted = {"pattern": "2:4", "calibration": text, **SMALL, **arguments}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prune_checkpoint(model, tmp_path / "out", **wanted)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["", "  \n ", "not json", '{"other": "field"}', '{"text": 3}', "[1]"])
def test_a_bad_calibration_file_is_named(tmp_path: Path, model: Path, content: str) -> None:
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"bad\.jsonl"):
        prune_checkpoint(model, tmp_path / "out", pattern="2:4", calibration=tmp_path / "bad.jsonl")


def test_the_output_may_not_be_in_the_model(tmp_path: Path, model: Path) -> None:
    for out in (model / "out", tmp_path):
        with pytest.raises((ValueError, FileExistsError)):
            prune_checkpoint(model, out, method="magnitude", pattern="2:4", overwrite=True)


def test_an_interruption_leaves_nothing(tmp_path: Path, model: Path, text: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == total - 1:
            raise KeyboardInterrupt

    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        prune_checkpoint(model, tmp_path / "out", pattern="2:4", calibration=text, progress=interrupt, **SMALL)
    assert sorted(tmp_path.iterdir()) == before


def peak_of_tensors(run) -> int:
    """The most bytes that tensors took at a time: the running total of what PyTorch's allocator records."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    level = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return peak


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_one_block_is_in_memory_at_a_time(tmp_path: Path, method: str) -> None:
    peaks, sizes = [], []
    for layers in (2, 6):
        folder = tmp_path / str(layers)
        model = tiny_llama(num_hidden_layers=layers, hidden_size=128, intermediate_size=384)
        # headers are read of a whole file mapped into memory, which is counted though it takes none
        model.save_pretrained(folder, max_shard_size="700KB")
        sizes.append(sum(tensor.nbytes for tensor in tensors(folder).values()))
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
