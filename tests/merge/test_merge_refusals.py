# SPDX-License-Identifier: Apache-2.0
"""Files, base models and outputs that a merge refuses: what is wrong with them is named, and nothing is written."""

import pickle
import re
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_spp import SPPConfig
from peft_spp.merge import merge_checkpoint

from helpers.hostile_adapters import Trap
from helpers.merge_cases import (
    auto,
    contents,
    edit_json,
    edit_tensors,
    gpt2_case,
    llama_case,
    save_adapter,
    stored,
)
from helpers.merge_refusals import ADAPTER, CONFIG, INDEX, PREFIX, Q_PROJ, assert_refused, edit_index, file_of
from helpers.tiny import tiny_llama


def test_a_pickled_base_is_not_read(tmp_path, case):
    for file in case.base.glob("*.safetensors*"):
        file.unlink()
    (case.base / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "trap")))
    assert_refused(tmp_path, case, "pytorch_model.bin")


@pytest.mark.parametrize("shard_size", ["50MB", "20KB"])
def test_a_base_that_is_a_variant_is_told_how_to_load(tmp_path, case, shard_size):
    for file in case.base.glob("*.safetensors*"):
        file.unlink()
    tiny_llama().save_pretrained(case.base, variant="fp16", max_shard_size=shard_size)
    assert len(list(case.base.glob("model.fp16*.safetensors"))) > (shard_size == "20KB")
    assert_refused(tmp_path, case, "but a variant: load it with from_pretrained(..., variant='fp16')")


def test_an_adapter_in_the_place_of_the_base_is_told(tmp_path, case):
    assert_refused(tmp_path, case, "but an adapter: pass the model that it is for", base=case.adapter)


def test_the_last_adapter_of_an_unfinished_run_is_named(tmp_path, case):
    for step in (5, 20):
        shutil.copytree(case.adapter, tmp_path / "run" / f"checkpoint-{step}")
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config\.json\. Pass .*run/checkpoint-20$"):
        merge_checkpoint(case.base, tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters_in_subfolders_are_named(tmp_path, case):
    for name in ("first", "second"):
        shutil.copytree(case.adapter, tmp_path / "named" / name)
    with pytest.raises(FileNotFoundError, match=r"json\. Pass one of its folders: first, second$"):
        merge_checkpoint(case.base, tmp_path / "named", tmp_path / "out")


@pytest.mark.parametrize("which", ["base", "adapter"])
@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_file_cut_short_is_named(tmp_path, case, which, keep):
    file = sorted(getattr(case, which).glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:keep])
    assert_refused(tmp_path, case, file)


@pytest.mark.parametrize(
    "content", [b"\xff" * 64, struct.pack("<Q", 8) + b"not json", struct.pack("<Q", 2**40) + b"{}", b"PK\x03\x04" * 9]
)
@pytest.mark.parametrize("which", ["base", "adapter"])
def test_a_damaged_file_is_named(tmp_path, case, which, content):
    file = sorted(getattr(case, which).glob("*.safetensors"))[0]
    file.write_bytes(content)
    assert_refused(tmp_path, case, file)


@pytest.mark.parametrize("text", ["", "[]", "{", '"SPP"', "\x00"])
@pytest.mark.parametrize("name", [CONFIG, "config.json", INDEX])
def test_damaged_json_is_named(tmp_path, case, name, text):
    file = (case.adapter if name == CONFIG else case.base) / name
    file.write_text(text)
    assert_refused(tmp_path, case, file)


def test_a_base_that_is_not_finite_is_told_from_a_broken_adapter(tmp_path, case):
    file = file_of(case.base, f"{Q_PROJ}.weight")
    weight = load_file(file)[f"{Q_PROJ}.weight"]
    weight[3, 5] = float("inf")
    edit_tensors(file, **{f"{Q_PROJ}.weight": weight})
    assert "base model is broken" in assert_refused(tmp_path, case, Q_PROJ, file)


def test_a_weight_without_elements_is_named(tmp_path, case):
    file = file_of(case.base, f"{Q_PROJ}.weight")
    edit_tensors(file, **{f"{Q_PROJ}.weight": torch.zeros(32, 0)})
    names = {f"{PREFIX}{Q_PROJ}.spp_A.weight": torch.ones(5, 0), f"{PREFIX}{Q_PROJ}.spp_B.weight": torch.ones(32, 1)}
    edit_tensors(case.adapter / ADAPTER, **names)
    assert_refused(tmp_path, case, Q_PROJ, file)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_quantized_weight_is_named(tmp_path, case, dtype):
    file = file_of(case.base, f"{Q_PROJ}.weight")
    edit_tensors(file, **{f"{Q_PROJ}.weight": torch.zeros(32, 32).to(dtype)})
    assert_refused(tmp_path, case, Q_PROJ, file)


def test_a_base_of_other_shapes_is_named(tmp_path, case):
    tiny_llama(intermediate_size=64).save_pretrained(tmp_path / "other")
    assert_refused(tmp_path, case, "down_proj", "(32, 64)", "(32, 48)", base=tmp_path / "other")


def test_a_module_that_the_checkpoint_does_not_hold_is_named(tmp_path, case):
    tiny_llama(num_hidden_layers=2).save_pretrained(tmp_path / "other")
    text = assert_refused(tmp_path, case, "model.layers.2", base=tmp_path / "other")
    assert "merge_and_unload" in text


def test_a_name_that_fits_two_tensors_is_refused(tmp_path, case):
    tensors = stored(case.base)
    (tmp_path / "two").mkdir()
    both = {f"{tower}.{name}": tensor.clone() for tower in ("teacher", "student") for name, tensor in tensors.items()}
    save_file(both, tmp_path / "two" / "model.safetensors")
    assert_refused(tmp_path, case, "'student.model.", "'teacher.model.", base=tmp_path / "two")


def test_a_tensor_in_two_files_is_refused(tmp_path, case):
    first, second, *_ = sorted(case.base.glob("*.safetensors"))
    name = sorted(load_file(first))[0]
    edit_tensors(second, **{name: load_file(first)[name]})
    assert_refused(tmp_path, case, name, first, second)


@pytest.mark.parametrize("named", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}])
@pytest.mark.parametrize("both_stored", [False, True])
def test_a_tensor_that_serves_two_modules_is_refused(tmp_path, named, both_stored):
    case = llama_case(tmp_path, settings={"tie_word_embeddings": True})
    save_adapter(
        tmp_path / "adapter-of-tied", auto("LlamaForCausalLM").from_pretrained(case.base), SPPConfig(r=4, **named)
    )
    if both_stored:
        embedding = load_file(case.base / "model.safetensors")["model.embed_tokens.weight"]
        edit_tensors(case.base / "model.safetensors", **{"lm_head.weight": embedding})
    case = case._replace(adapter=tmp_path / "adapter-of-tied")
    text = assert_refused(tmp_path, case, "lm_head" if "target_modules" in named else "embed_tokens")
    assert "merge_and_unload" in text


def test_tied_embeddings_of_an_unknown_architecture_are_told_by_their_names(tmp_path, case):
    edit_json(case.base / "config.json", architectures=["TheirOwnModel"], tie_word_embeddings=True)
    config = SPPConfig(r=5, modules_to_save=["embed_tokens"])
    save_adapter(case.adapter, auto("LlamaForCausalLM").from_pretrained(case.base), config)
    assert_refused(tmp_path, case, "embed_tokens")


def test_a_square_weight_of_unknown_layout_is_refused(tmp_path):
    case = gpt2_case(tmp_path, SPPConfig(r=4, target_modules=["attn.c_proj"]))
    tensors = load_file(case.base / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "attn.c_proj.weight" in k}, case.base / "model.safetensors")
    (case.base / "config.json").unlink()
    assert_refused(tmp_path, case, "attn.c_proj.weight", "(in, out)")


def test_safetensors_that_transformers_would_not_load_are_refused(tmp_path, case):
    (case.base / INDEX).unlink()
    assert_refused(tmp_path, case, "model.safetensors", case.base)


@pytest.mark.parametrize("where", ["../elsewhere.safetensors", "/etc/passwd", "C:\\w"])
def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path, case, where):
    index = edit_index(case.base, **{"model.norm.weight": where})
    assert_refused(tmp_path, case, index, repr(where))


def test_a_missing_shard_is_named(tmp_path, case):
    shard = sorted(case.base.glob("*.safetensors"))[0]
    shard.unlink()
    assert_refused(tmp_path, case, shard.name)


def test_an_index_that_names_a_tensor_that_is_not_there_is_refused(tmp_path, case):
    edit_index(case.base, **{"model.extra.weight": file_of(case.base, "model.norm.weight").name})
    assert_refused(tmp_path, case, "model.extra.weight")


def test_the_output_may_not_touch_what_is_read(tmp_path, case):
    before = contents(tmp_path)
    for output in (case.base, case.base / "out", case.adapter, case.adapter / "a" / "out", case.base.parent):
        for overwrite in (False, True):
            with pytest.raises((ValueError, FileExistsError), match=re.escape(str(output))):
                merge_checkpoint(case.base, case.adapter, output, overwrite=overwrite)
    assert contents(tmp_path) == before


def test_an_output_through_a_link_may_not_touch_the_base_either(tmp_path, case):
    (tmp_path / "link").symlink_to(case.base, target_is_directory=True)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="base"):
        merge_checkpoint(case.base, case.adapter, tmp_path / "link", overwrite=True)
    assert contents(tmp_path) == before


def test_a_folder_that_is_not_empty_is_refused(tmp_path, case):
    (tmp_path / "deep" / "out").mkdir(parents=True)
    (tmp_path / "deep" / "out" / "notes.txt").write_text("mine")
    assert_refused(tmp_path, case, "out", kind=FileExistsError)
    # and is never replaced if it does not hold a model
    assert_refused(tmp_path, case, "out", kind=FileExistsError, overwrite=True)


def test_a_file_in_the_place_of_the_output_is_refused(tmp_path, case):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "out").write_text("mine")
    for overwrite in (False, True):
        assert_refused(tmp_path, case, "out", kind=FileExistsError, overwrite=overwrite)


def test_what_is_not_there_is_named(tmp_path, case):
    assert_refused(tmp_path, case, "no/such-model", base="no/such-model", kind=FileNotFoundError)
    assert_refused(tmp_path, case._replace(adapter=tmp_path / "nowhere"), "nowhere", kind=FileNotFoundError)
    assert_refused(tmp_path, case, CONFIG, kind=FileNotFoundError, adapter_subfolder="nowhere")
