# SPDX-License-Identifier: Apache-2.0
"""`peft-spp compress` and `decompress`: from disk to disk, and back to the same bits."""

import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import peft_spp
from peft_spp import BitmaskConfig
from peft_spp.cli import app
from peft_spp.compressed.checkpoint_run import compress_checkpoint, decompress_checkpoint
from peft_spp.functional.bitmask import bitmask_bytes
from peft_spp.pruning import prune_checkpoint

from helpers.compressed_cases import pruned_llama, same_tensors, tensors_of
from helpers.tiny import block_linears, prune_, tiny, tiny_llama


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run(*arguments):
    return CliRunner().invoke(app, [str(one) for one in arguments])


def contents(folder):
    return {one.relative_to(folder).as_posix(): one.read_bytes() for one in folder.rglob("*") if one.is_file()}


@pytest.fixture
def dense(tmp_path):
    model = pruned_llama(torch.bfloat16)
    model.save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "README.md").write_text("---\nlicense: mit\n---\n\n# A model\n")
    (tmp_path / "dense" / "tokenizer.json").write_text("{}")
    return tmp_path / "dense"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_size", ["1GB", "6KB"])
def test_every_file_comes_back_bit_for_bit(tmp_path, dtype, tied, shard_size):
    model = pruned_llama(dtype, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "dense", max_shard_size=shard_size)
    (tmp_path / "dense" / "README.md").write_bytes(b"# A model\n\nwith \xff in its card")
    result = run("compress", tmp_path / "dense", tmp_path / "small")
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) == len(
        list((tmp_path / "small").glob("*.safetensors"))
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype="auto")
    assert loaded.dtype == dtype
    assert same_tensors(loaded.dequantize().state_dict(), model.state_dict())
    result = run("decompress", tmp_path / "small", tmp_path / "again")
    assert result.exit_code == 0, result.output
    before, after = contents(tmp_path / "dense"), contents(tmp_path / "again")
    # Transformers sorts the keys of what it writes
    assert json.loads(before.pop("config.json")) == json.loads(after.pop("config.json"))
    assert before == after


@pytest.mark.parametrize("shard_size", ["1GB", "6KB"])
def test_the_command_writes_what_from_pretrained_and_save_pretrained_do(dense, tmp_path, shard_size):
    loaded = AutoModelForCausalLM.from_pretrained(dense, dtype="auto", quantization_config=BitmaskConfig())
    loaded.save_pretrained(tmp_path / "saved", max_shard_size=shard_size)
    compress_checkpoint(dense, tmp_path / "small")
    assert same_tensors(tensors_of(tmp_path / "small"), tensors_of(tmp_path / "saved"))
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("small", "saved")]
    assert configs[0] == configs[1]
    # and what Transformers has saved can be decompressed, with a bitmask in another shard than its values
    decompress_checkpoint(tmp_path / "saved", tmp_path / "again")
    assert same_tensors(tensors_of(tmp_path / "again"), tensors_of(dense))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto")
    assert same_tensors(model.state_dict(), load_file(dense / "model.safetensors"))


def test_the_report_counts_bytes_and_says_what_stays_dense(dense, tmp_path):
    tensors = load_file(dense / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"].fill_(1.0)
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    result = run("compress", dense, tmp_path / "small", "--json")
    report = json.loads(result.stdout)
    names = block_linears(pruned_llama()).keys() - {"model.layers.2.mlp.up_proj"}
    assert {one["name"] for one in report["modules"]} == names
    assert report["kept"] == {"lm_head": "left out", "model.layers.2.mlp.up_proj": "0.0% zeros"}
    for one in report["modules"]:
        name = one["name"]
        rows, columns = one["shape"]
        stored = int((tensors[f"{name}.weight"].view(torch.int16) != 0).sum())
        assert (one["stored"], one["dense_bytes"]) == (stored, rows * columns * 2)
        assert one["compressed_bytes"] == stored * 2 + rows * bitmask_bytes(columns)
    written = load_file(tmp_path / "small" / "model.safetensors").values()
    assert report["bytes_after"] == sum(one.numel() * one.element_size() for one in written)
    assert report["bytes_before"] == sum(one.numel() * one.element_size() for one in tensors.values())
    text = run("compress", dense, tmp_path / "other").stdout
    assert "20 linear layers compressed" in text
    assert "1 stay dense (too few zeros): model.layers.2.mlp.up_proj" in text
    assert "1 stay dense (left out): lm_head" in text


def test_the_card_says_how_to_load_it(dense, tmp_path):
    run("compress", dense, tmp_path / "small")
    text = (tmp_path / "small" / "README.md").read_text()
    assert text.startswith((dense / "README.md").read_text())
    assert "import peft_spp" in text
    assert (tmp_path / "small" / "tokenizer.json").read_text() == "{}"


def test_options_choose_what_is_compressed(dense, tmp_path):
    result = run(
        "compress", dense, tmp_path / "a", "--exclude-modules", "o_proj", "--exclude-modules", "lm_head", "--json"
    )
    assert {one["name"].rpartition(".")[2] for one in json.loads(result.stdout)["modules"]} == {
        "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    with pytest.warns(UserWarning, match="modules_to_not_convert: no linear layer of the model matches 'o_poj'"):
        run(
            "compress",
            dense,
            tmp_path / "b",
            "--dry-run",
            "--exclude-modules",
            "o_poj",
            "--exclude-modules",
            "lm_head",
        )
    result = run("compress", dense, tmp_path / "b", "--min-sparsity", "0.99", "--json")
    assert json.loads(result.stdout)["modules"] == []


def test_a_format_that_says_nothing_is_no_quantization(dense, tmp_path):
    config = json.loads((dense / "config.json").read_text())
    empty = {"quant_method": "compressed-tensors", "config_groups": {}, "sparsity_config": {"format": "dense"}}
    (dense / "config.json").write_text(json.dumps({**config, "quantization_config": {**empty, "format": "dense"}}))
    before = compress_checkpoint(dense, tmp_path / "small")
    prune_checkpoint(dense, tmp_path / "pruned", method="magnitude", pattern="1:4", compress=True)
    for name in ("small", "pruned"):
        written = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        assert written["quant_method"] == "bitmask"
    decompress_checkpoint(tmp_path / "small", tmp_path / "again")
    assert len(before) and "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    for dry_run in (True, False):
        with pytest.raises(ValueError, match="dense is quantized"):
            prune_checkpoint(dense, tmp_path / "no", method="magnitude", pattern="1:4", compress=True, dry_run=dry_run)
    assert not (tmp_path / "no").exists()


def test_the_index_of_a_decompressed_model_counts_all_its_parameters(tmp_path):
    model = pruned_llama()
    count = model.num_parameters()
    peft_spp.compress(model).save_pretrained(tmp_path / "small", max_shard_size="6KB")
    decompress_checkpoint(tmp_path / "small", tmp_path / "dense")
    index = json.loads((tmp_path / "dense" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_parameters"] == count


def test_nothing_is_written_in_a_dry_run_and_nothing_overwritten_unasked(dense, tmp_path):
    dry = json.loads(run("compress", dense, tmp_path / "small", "--dry-run", "--json").stdout)
    assert not (tmp_path / "small").exists()
    wet = json.loads(run("compress", dense, tmp_path / "small", "--json").stdout)
    assert dry == {**wet, "dry_run": True}
    before = contents(tmp_path / "small")
    result = run("compress", dense, tmp_path / "small")
    assert result.exit_code == 2
    assert "is not empty" in result.stderr
    assert contents(tmp_path / "small") == before
    assert run("compress", dense, tmp_path / "small", "--overwrite").exit_code == 0
    assert contents(tmp_path / "small") == before
    dry = json.loads(run("decompress", tmp_path / "small", tmp_path / "again", "--dry-run", "--json").stdout)
    assert not (tmp_path / "again").exists()
    assert dry["bytes_after"] == wet["bytes_before"]


@pytest.mark.parametrize(
    ("command", "config", "message"),
    [
        ("compress", {"quantization_config": {"quant_method": "bitmask", "version": 1}}, "compressed already"),
        ("compress", {"quantization_config": {"quant_method": "awq"}}, "is quantized"),
        ("compress", {"model_type": "unknown-model"}, "cannot build the model"),
        ("decompress", {}, "is not compressed"),
    ],
)
def test_what_cannot_be_done_is_refused(dense, tmp_path, command, config, message):
    content = json.loads((dense / "config.json").read_text())
    if "model_type" in config:
        content["architectures"] = ["UnknownForCausalLM"]
    (dense / "config.json").write_text(json.dumps({**content, **config}))
    result = run(command, dense, tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["decompress", "inspect", "compare", "prune"])
def test_a_format_of_the_future_is_refused_by_every_command(dense, tmp_path, command):
    small = tmp_path / "small"
    compress_checkpoint(dense, small)
    content = json.loads((small / "config.json").read_text())
    content["quantization_config"]["version"] = 2
    (small / "config.json").write_text(json.dumps(content))
    arguments = {"decompress": [tmp_path / "out"], "compare": [small], "inspect": []}
    result = run(
        command, small, *arguments.get(command, [tmp_path / "out", "--method", "magnitude", "--sparsity", "0.6"])
    )
    assert result.exit_code == 2
    assert "config.json: the weights are compressed in version 2 of the format" in result.stderr


def test_a_model_without_zeros_comes_back(dense, tmp_path):
    plain = tiny_llama()
    plain.save_pretrained(tmp_path / "plain")
    assert run("compress", tmp_path / "plain", tmp_path / "small").exit_code == 0
    result = run("decompress", tmp_path / "small", tmp_path / "again")
    assert result.exit_code == 0, result.stderr
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert same_tensors(loaded.state_dict(), plain.state_dict())


@pytest.mark.parametrize(
    "damage", ["values", "dtype", "bitmask", "beyond", "columns", "no columns", "missing", "truncated"]
)
def test_a_damaged_checkpoint_is_not_decompressed(dense, tmp_path, damage):
    small = tmp_path / "small"
    compress_checkpoint(dense, small)
    file, name = small / "model.safetensors", "model.layers.1.mlp.down_proj"
    tensors = load_file(file)
    columns = {f"{one}.weight": layer.in_features for one, layer in block_linears(pruned_llama()).items()}
    if damage == "values":
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"][1:].clone()
    elif damage == "dtype":
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"].int()
    elif damage == "bitmask":
        tensors[f"{name}.bitmask"][3, 2] = 255
    elif damage == "beyond":
        tensors[f"{name}.bitmask"][3, 7] = 1
    elif damage == "columns":
        columns[f"{name}.weight"] = 128
    elif damage == "missing":
        del tensors[f"{name}.bitmask"]
    metadata = {} if damage == "no columns" else {"bitmask_columns": json.dumps(columns)}
    save_file(tensors, file, metadata)
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-5])
    result = run("decompress", small, tmp_path / "out")
    assert result.exit_code == 2
    assert ("model.safetensors" if damage == "truncated" else "model.layers.") in result.stderr, result.stderr
    if damage not in ("no columns", "truncated"):
        assert name in result.stderr
    assert not (tmp_path / "out").exists()
    assert not [one for one in tmp_path.iterdir() if one.name.startswith(".")]
    if damage == "dtype":
        result = run("inspect", small)
        assert result.exit_code == 2 and f"{name}.weight' is compressed, and has dtype I32" in result.stderr


@pytest.mark.parametrize("shape", [(1 << 40, 0), (0, 1 << 29, 1 << 33)], ids=["rows", "columns"])
def test_a_file_of_a_few_bytes_does_not_ask_for_all_memory(tmp_path, shape):
    columns = json.dumps({"a.weight": 8 * shape[-1]})
    header = {"__metadata__": {"bitmask_columns": columns}}
    for name, dtype, size in (("a.weight", "F16", [0]), ("a.bitmask", "U8", shape)):
        header[name] = {"dtype": dtype, "shape": size, "data_offsets": [0, 0]}
    text = json.dumps(header).encode()
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    for command in ("decompress", "inspect"):
        result = run(command, tmp_path / "small", *([tmp_path / "out"] if command == "decompress" else []))
        assert result.exit_code == 2
        assert "model.safetensors" in result.stderr or "a.weight" in result.stderr


def test_the_body_of_a_model_and_a_model_without_head(tmp_path):
    model = tiny("LlamaModel", **{**pruned_llama().config.to_dict(), "architectures": None})
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            prune_(layer.weight, "0.5")
            assert ".layers." in f".{name}"
    model.save_pretrained(tmp_path / "dense")
    assert len(compress_checkpoint(tmp_path / "dense", tmp_path / "small")) == 21
    loaded = type(model).from_pretrained(tmp_path / "small")
    assert same_tensors(loaded.dequantize().state_dict(), model.state_dict())


def test_other_weights_next_to_it_are_not_copied(dense, tmp_path):
    (dense / "pytorch_model.bin").write_bytes(b"?")
    shutil.copyfile(dense / "model.safetensors", dense / "other.safetensors")
    report = compress_checkpoint(dense, tmp_path / "small")
    assert set(report.left_out) == {"pytorch_model.bin", "other.safetensors"}
    assert {one.name for one in (tmp_path / "small").iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    }  # fmt: skip


def test_progress_ends_with_all_bytes(dense, tmp_path):
    seen = []
    report = compress_checkpoint(dense, tmp_path / "small", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (report.bytes_after, report.bytes_after)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_model_compressed_in_memory_is_decompressed_by_command(tmp_path):
    model = pruned_llama()
    expected = {name: one.clone() for name, one in model.state_dict().items()}
    peft_spp.compress(model).save_pretrained(tmp_path / "small", max_shard_size="6KB")
    decompress_checkpoint(tmp_path / "small", tmp_path / "dense")
    assert same_tensors(tensors_of(tmp_path / "dense"), expected)
