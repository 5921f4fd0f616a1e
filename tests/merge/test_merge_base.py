# SPDX-License-Identifier: Apache-2.0
"""A merge looks at the masks of the base model, and at what was merged into it before."""

import json
import os
import shutil
import warnings

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from peft_spp.checkpoints.card import Card
from peft_spp.checkpoints.merged import MERGED
from peft_spp.cli import app
from peft_spp.installing import how_to_install
from peft_spp.merge import merge_checkpoint

from helpers.merge_cases import contents, edit_json, llama_case, save_adapter, stored
from helpers.tiny import prune_, tiny_llama


@pytest.fixture
def case(tmp_path):
    return llama_case(tmp_path, shard_size="20KB")


def other_base(folder, pattern=None):
    """The same model, pruned in other places or not at all."""
    torch.manual_seed(7)
    model = tiny_llama()
    if pattern:
        for name, parameter in model.named_parameters():
            if ".layers." in name and parameter.dim() == 2:
                prune_(parameter.data, pattern)
    model.save_pretrained(folder)
    return folder


def merge(*arguments):
    return CliRunner().invoke(app, ["merge", *map(str, arguments)])


def test_the_base_of_the_training_is_merged_into_without_a_warning(tmp_path, case):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = merge_checkpoint(case.base, case.adapter, tmp_path / "out", check_base="error")
    assert "21 modules" in report.base_masks


@pytest.mark.parametrize("pattern", ["2:4", "4:8", None])
def test_another_base_is_told_or_refused(tmp_path, case, pattern):
    base = other_base(tmp_path / "other", pattern)
    for dry_run in (True, False):
        with pytest.raises(ValueError, match=r"21 of 21 modules: model\.layers\.0\."):
            merge_checkpoint(base, case.adapter, tmp_path / "out", check_base="error", dry_run=dry_run)
        assert not (tmp_path / "out").exists()
    with pytest.warns(UserWarning, match=r"with different masks .* 21 of 21 modules: model\.layers\.0\."):
        dry = merge_checkpoint(base, case.adapter, tmp_path / "out", dry_run=True)
    assert dry.base_masks.startswith("different")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_checkpoint(base, case.adapter, tmp_path / "out", check_base="off")


def test_one_module_with_another_mask_is_named(tmp_path, case):
    file = next(file for file in case.base.glob("*.safetensors") if any("2.mlp.up_proj" in k for k in load_file(file)))
    tensors = load_file(file)
    name = next(name for name in tensors if "2.mlp.up_proj" in name)
    tensors[name] = tensors[name].roll(1, dims=1)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 of 21 modules: model\.layers\.2\.mlp\.up_proj"):
        merge_checkpoint(case.base, case.adapter, tmp_path / "out", check_base="error")


def test_a_base_that_lost_no_zero_but_gained_some_passes(tmp_path, case):
    for file in case.base.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if "down_proj" in name:
                tensor[0] = 0
        save_file(tensors, file, metadata={"format": "pt"})
    merge_checkpoint(case.base, case.adapter, tmp_path / "out", check_base="error")


def test_the_command_warns_refuses_and_keeps_quiet(tmp_path, case):
    base = other_base(tmp_path / "other", "2:4")
    refused = merge(case.adapter, tmp_path / "out", "--base", base, "--check-base", "error")
    assert refused.exit_code == 2 and "21 of 21 modules" in refused.stderr and not (tmp_path / "out").exists()
    with pytest.warns(UserWarning, match="with different masks"):
        told = merge(case.adapter, tmp_path / "out", "--base", base, "--dry-run", "--json")
    assert told.exit_code == 0 and json.loads(told.stdout)["base_masks"].startswith("different")
    quiet = merge(case.adapter, tmp_path / "out", "--base", base, "--check-base", "off")
    assert quiet.exit_code == 0 and "not compared" in quiet.stdout
    assert merge(case.adapter, tmp_path / "out", "--check-base", "perhaps").exit_code == 2


def test_an_adapter_without_a_record_is_merged_and_the_report_says_so_or_is_refused(tmp_path, case):
    (case.adapter / "base_masks.json").unlink()
    for dry_run in (True, False):
        with pytest.raises(ValueError, match=r"no record of its base model.*base_masks\.json"):
            merge_checkpoint(case.base, case.adapter, tmp_path / "out", check_base="error", dry_run=dry_run)
        assert not (tmp_path / "out").exists()
    refused = merge(case.adapter, tmp_path / "out", "--base", case.base, "--check-base", "error")
    assert refused.exit_code == 2 and "has no record" in " ".join(refused.stderr.split())
    report = merge_checkpoint(case.base, case.adapter, tmp_path / "out")
    assert "no record" in report.base_masks


def test_an_adapter_is_not_merged_twice(tmp_path, case):
    merge_checkpoint(case.base, case.adapter, tmp_path / "once")
    before = contents(tmp_path)
    for dry_run in (True, False):
        for check in ("warn", "off"):
            with pytest.raises(ValueError, match=r"applied twice.*--base"):
                merge_checkpoint(
                    tmp_path / "once", case.adapter, tmp_path / "twice", dry_run=dry_run, check_base=check
                )
    assert contents(tmp_path) == before
    # the base itself can be merged again, and another adapter on top
    merge_checkpoint(case.base, case.adapter, tmp_path / "again")
    torch.manual_seed(3)
    save_adapter(tmp_path / "second", case.model_class.from_pretrained(tmp_path / "once"))
    merge_checkpoint(tmp_path / "once", tmp_path / "second", tmp_path / "both")
    assert len(json.loads((tmp_path / "both" / "config.json").read_text())[MERGED]) == 2
    for adapter in (case.adapter, tmp_path / "second"):
        with pytest.raises(ValueError, match="applied twice"):
            merge_checkpoint(tmp_path / "both", adapter, tmp_path / "thrice")


def test_the_list_of_merged_adapters_survives_what_people_do_to_a_model(tmp_path, case):
    merge_checkpoint(case.base, case.adapter, tmp_path / "once")
    shutil.copytree(tmp_path / "once", tmp_path / "copied")
    AutoModelForCausalLM.from_pretrained(tmp_path / "once", dtype=torch.bfloat16).save_pretrained(tmp_path / "saved")
    shutil.copytree(case.adapter, tmp_path / "renamed")
    edit_json(tmp_path / "renamed" / "adapter_config.json", inference_mode=False)
    adapters = {name: tmp_path / name for name in ("bfloat16", "float16")}
    for name, folder in adapters.items():
        case.peft_model().to(getattr(torch, name)).save_pretrained(folder)
    for base in ("copied", "saved"):
        for adapter in (case.adapter, tmp_path / "renamed", *adapters.values()):
            with pytest.raises(ValueError, match="applied twice"):
                merge_checkpoint(tmp_path / base, adapter, tmp_path / "twice")
            with pytest.warns(UserWarning, match="applied twice"):
                PeftModel.from_pretrained(case.model_class.from_pretrained(tmp_path / base), adapter)
    # the other way round: the adapter that was merged is the rounded one
    for name, folder in adapters.items():
        merge_checkpoint(case.base, folder, tmp_path / f"of_{name}")
        with pytest.raises(ValueError, match="applied twice"):
            merge_checkpoint(tmp_path / f"of_{name}", case.adapter, tmp_path / "twice")
    with torch.no_grad():
        other = case.peft_model()
        next(one for name, one in other.named_parameters() if "spp_B" in name).view(-1)[3] += 0.01
    other.save_pretrained(tmp_path / "other")
    merge_checkpoint(tmp_path / "once", tmp_path / "other", tmp_path / "both")


@pytest.mark.parametrize("how", ["`pip install peft-spp`", how_to_install(code="`")])
def test_the_card_of_a_merged_model_says_what_it_is(how, tmp_path, case):
    card = (
        "---\nlicense: mit\ntags:\n- pruned\n- 2:4\n---\n# A pruned model\n\n## Pruning\n\nWanda.\n\n"
        f"To fine-tune it and keep it as sparse, use [SPP](https://arxiv.org/abs/2405.16057) ({how})."
    )
    (case.base / "README.md").write_text(card)
    report = merge_checkpoint(case.base, case.adapter, tmp_path / "merged")
    written = (tmp_path / "merged" / "README.md").read_text()
    assert written.startswith("---\nlicense: mit\n") and "- spp\n" in written and "Wanda." in written
    assert "# merged\n" in written and "SPP adapter" in written and f"{report.numel:,} weights" in written
    assert "To fine-tune it" not in written and str(tmp_path) not in written


def test_what_decorates_cannot_end_a_merge(tmp_path, case):
    (case.base / "README.md").write_bytes(b"---\ntags: [1, true, {\n---\ncaf\xe9")
    with pytest.warns(UserWarning, match=r"README\.md"):
        merge_checkpoint(case.base, case.adapter, tmp_path / "merged")
    assert "café" in (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    assert stored(tmp_path / "merged").keys() == stored(case.base).keys()


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_folder_that_safetensors_cannot_read_is_refused_at_once(tmp_path, case, dry_run):
    before = contents(tmp_path)
    for place in (tmp_path / os.fsdecode(b"mod\xe8le"), tmp_path / os.fsdecode(b"\xff") / "out"):
        with pytest.raises(ValueError, match="is not UTF-8"):
            merge_checkpoint(case.base, case.adapter, place, dry_run=dry_run)
    assert contents(tmp_path) == before


def test_a_file_name_that_is_not_utf8_cannot_end_a_run_at_its_card():
    assert r"calibration: \udcff.txt" in str(Card(text="calibration: \udcff.txt")).encode().decode()


def test_a_model_that_was_merged_in_memory_says_so_too(tmp_path, case):
    base = case.model_class.from_pretrained(case.base)
    merged = PeftModel.from_pretrained(base, case.adapter).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    merge_checkpoint(case.base, case.adapter, tmp_path / "from_disk")
    ids = [json.loads((tmp_path / name / "config.json").read_text())[MERGED] for name in ("merged", "from_disk")]
    assert len(ids[0]) == 1 and ids[0] == ids[1]
    with pytest.raises(ValueError, match="applied twice"):
        merge_checkpoint(tmp_path / "merged", case.adapter, tmp_path / "twice")


def test_an_adapter_is_not_loaded_silently_onto_a_model_that_it_was_merged_into(tmp_path, case):
    merge_checkpoint(case.base, case.adapter, tmp_path / "merged")
    with pytest.warns(UserWarning, match="already merged into this model"):
        PeftModel.from_pretrained(case.model_class.from_pretrained(tmp_path / "merged"), case.adapter)
    with pytest.raises(ValueError, match="already merged into this model"):
        PeftModel.from_pretrained(
            case.model_class.from_pretrained(tmp_path / "merged"), case.adapter, check_base="error"
        )


@pytest.mark.parametrize("dry_run", [True, False])
def test_foreign_files_end_a_dry_run_as_a_run(tmp_path, case, dry_run):
    shutil.copytree(case.base, tmp_path / "out")
    (tmp_path / "out" / ".git").mkdir()
    (tmp_path / "out" / ".git" / "HEAD").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=r"\.git/HEAD"):
        merge_checkpoint(case.base, case.adapter, tmp_path / "out", overwrite=True, dry_run=dry_run)
    assert contents(tmp_path) == before


DENSE = {"format": "dense", "global_sparsity": 0.5, "sparsity_structure": "2:4", "targets": ["Linear"], "ignore": []}


@pytest.mark.parametrize(
    ("key", "content", "kept"),
    [
        ("sparsity_config", DENSE, False),
        ("compression_config", {"quant_method": "compressed-tensors", "sparsity_config": DENSE}, False),
        ("compression_config", {"format": "dense", "sparsity_config": DENSE, "config_groups": {}}, False),
        ("compression_config", {"sparsity_config": DENSE, "config_groups": {"group_0": {}}}, True),
        ("compression_config", {"format": "pack-quantized"}, True),
        ("compression_config", "unknown", True),
        ("sparsity", DENSE, True),
    ],
)
def test_what_names_a_sparse_format_that_nothing_is_stored_in_is_left_out(tmp_path, key, content, kept):
    """vLLM refuses a model for it."""
    case = llama_case(tmp_path)
    config = case.base / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), key: content}))
    merge_checkpoint(case.base, case.adapter, tmp_path / "out")
    merged = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (merged.get(key) == content) is kept and merged["model_type"] == "llama"
