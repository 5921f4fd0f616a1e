# SPDX-License-Identifier: Apache-2.0
"""The merged checkpoint, tensor by tensor, against `merge_and_unload` and `save_pretrained`."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_spp import SPPConfig
from peft_spp.checkpoints.merged import MERGED
from peft_spp.functional import Factors, merged_weight
from peft_spp.merge import merge_checkpoint, pieces
from peft_spp.sparsity import compare_sparsity

from helpers.every_model import build
from helpers.merge_cases import (
    BERT,
    Case,
    assert_same_bits,
    auto,
    contents,
    edit_tensors,
    gpt2_case,
    llama_case,
    merged_by_peft,
    save_adapter,
    save_case,
    stored,
)
from helpers.reference import effective_weight
from helpers.tiny import is_positive_zero, tiny, tiny_llama


DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def assert_merges_as_peft_does(case: Case, folder) -> None:
    merge_checkpoint(case.base, case.adapter, folder / "out")
    assert_same_bits(stored(folder / "out"), stored(merged_by_peft(case, folder / "peft")))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_llama_has_the_bits_of_merge_and_unload(tmp_path, dtype, shard_size):
    case = llama_case(tmp_path, dtype=dtype, shard_size=shard_size)
    assert (len(list(case.base.glob("*.safetensors"))) > 1) is (shard_size == "20KB")
    assert_merges_as_peft_does(case, tmp_path)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_conv1d_has_the_bits_of_merge_and_unload(tmp_path, dtype):
    assert_merges_as_peft_does(gpt2_case(tmp_path, dtype=dtype), tmp_path)


def test_conv1d_is_told_without_a_config(tmp_path):
    case = gpt2_case(tmp_path)
    expected = stored(merged_by_peft(case, tmp_path / "peft"))
    (case.base / "config.json").unlink()
    merge_checkpoint(case.base, case.adapter, tmp_path / "out")
    assert_same_bits(stored(tmp_path / "out"), expected)


@pytest.mark.parametrize("make", [llama_case, gpt2_case])
@pytest.mark.parametrize("piece_bytes", [1, 100, 1000])
def test_the_size_of_the_pieces_does_not_matter(tmp_path, monkeypatch, make, piece_bytes):
    monkeypatch.setattr(pieces, "PIECE_BYTES", piece_bytes)
    assert_merges_as_peft_does(make(tmp_path, dtype=torch.bfloat16, shard_size="20KB"), tmp_path)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "r"), [(53, 37, 5), (7, 129, 7), (1, 65, 1), (200, 3, 64), (64, 200, 3)])
@pytest.mark.parametrize("piece_bytes", [512, 4000])
@pytest.mark.parametrize("transposed", [False, True])
def test_odd_shapes_are_merged_as_a_whole_weight_is(tmp_path, monkeypatch, dtype, m, n, r, piece_bytes, transposed):
    torch.manual_seed(0)
    monkeypatch.setattr(pieces, "PIECE_BYTES", piece_bytes)
    weight, A, B = torch.randn(m, n, dtype=dtype), torch.randn(r, n), torch.randn(m, 1)
    weight[torch.rand(m, n) < 0.5] = 0
    (tmp_path / "base").mkdir()
    base = {"fc.weight": weight.t().contiguous() if transposed else weight}
    save_file(base, tmp_path / "base" / "model.safetensors")
    SPPConfig(r=r, spp_alpha=3, target_modules=["fc"]).save_pretrained(tmp_path / "adapter")
    factors = {"base_model.model.fc.spp_A.weight": A, "base_model.model.fc.spp_B.weight": B}
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = stored(tmp_path / "out")["fc.weight"]
    merged = merged.t().contiguous() if transposed else merged
    assert_same_bits({"fc": merged}, {"fc": merged_weight(weight, [Factors(A, B, 3 / r)])})
    torch.testing.assert_close(merged, effective_weight(weight, [(A, B, 3 / r)]).to(dtype))
    assert is_positive_zero(merged)[weight == 0].all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("base_dtype", [torch.bfloat16, torch.float64], ids=str)
def test_factors_of_another_dtype_are_taken_as_peft_takes_them(tmp_path, dtype, base_dtype):
    case = llama_case(tmp_path, dtype=base_dtype)
    file = case.adapter / "adapter_model.safetensors"
    edit_tensors(file, **{name: tensor.to(dtype) for name, tensor in load_file(file).items()})
    assert_merges_as_peft_does(case, tmp_path)


def test_patterns_of_rank_and_alpha(tmp_path):
    config = SPPConfig(
        r=5,
        task_type="CAUSAL_LM",
        rank_pattern={"down_proj": 100, r"^model\.layers\.0\.self_attn\.q_proj": 3},
        alpha_pattern={r"layers\.1\..*": 7, "o_proj": 1.5},
    )
    case = llama_case(tmp_path, config)
    assert_merges_as_peft_does(case, tmp_path)
    report = merge_checkpoint(case.base, case.adapter, tmp_path / "again", dry_run=True)
    assert report["model.layers.0.mlp.down_proj"].r == 32
    assert report["model.layers.0.self_attn.q_proj"].r == 3
    assert report["model.layers.1.self_attn.k_proj"].scaling == 7 / 5
    assert report["model.layers.2.self_attn.o_proj"].scaling == 1.5 / 5


@pytest.mark.parametrize("bias", ["all", "spp_only"])
@pytest.mark.parametrize("make", [gpt2_case, llama_case])
def test_trained_biases_are_written(tmp_path, bias, make):
    config = SPPConfig(r=4, task_type="CAUSAL_LM", bias=bias)
    options = {"settings": {"attention_bias": True, "mlp_bias": True}} if make is llama_case else {}
    case = make(tmp_path, config, dtype=torch.bfloat16, **options)
    assert_merges_as_peft_does(case, tmp_path)
    report = merge_checkpoint(case.base, case.adapter, tmp_path / "again", dry_run=True)
    assert report.replaced and all(name.endswith(".bias") for name in report.replaced)
    before, after = stored(case.base), stored(tmp_path / "out")
    assert not any(torch.equal(before[name], after[name]) for name in report.replaced)


def test_modules_to_save_are_written(tmp_path):
    case = llama_case(tmp_path, SPPConfig(r=4, task_type="CAUSAL_LM", modules_to_save=["lm_head"]))
    assert_merges_as_peft_does(case, tmp_path)
    assert not torch.equal(stored(case.base)["lm_head.weight"], stored(tmp_path / "out")["lm_head.weight"])


def test_embeddings_saved_with_the_adapter_are_written(tmp_path):
    case = llama_case(tmp_path)
    model = case.peft_model()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)
    model.save_pretrained(case.adapter, save_embedding_layers=True)
    assert_merges_as_peft_does(case, tmp_path)
    report = merge_checkpoint(case.base, case.adapter, tmp_path / "again", dry_run=True)
    assert set(report.replaced) == {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize("bias", ["none", "all"])
def test_a_classifier_is_written_with_its_biases(tmp_path, bias):
    """Of a module to save PEFT saves trained biases under several names."""
    model = tiny("BertForSequenceClassification", **BERT)
    case = save_case(tmp_path, model, SPPConfig(r=4, task_type="SEQ_CLS", bias=bias))
    assert_merges_as_peft_does(case, tmp_path)
    report = merge_checkpoint(case.base, case.adapter, tmp_path / "again", dry_run=True)
    assert {"classifier.weight", "classifier.bias"} <= set(report.replaced)


def test_an_adapter_of_the_whole_model_fits_the_body_saved_alone(tmp_path):
    body = tiny_llama().model
    case = save_case(tmp_path, body, model_class=auto("LlamaForCausalLM"))
    merge_checkpoint(case.base, case.adapter, tmp_path / "out")
    expected = stored(merged_by_peft(case, tmp_path / "peft"))
    expected.pop("lm_head.weight")
    assert_same_bits(
        {f"model.{name}": tensor for name, tensor in stored(tmp_path / "out").items()},
        expected,
    )


def test_an_adapter_of_the_body_fits_the_whole_model(tmp_path):
    case = llama_case(tmp_path)
    body = auto("LlamaModel")
    save_adapter(tmp_path / "of-body", body.from_pretrained(case.base), SPPConfig(r=5))
    of_body = Case(case.base, tmp_path / "of-body", body)
    merge_checkpoint(case.base, of_body.adapter, tmp_path / "out")
    out = stored(tmp_path / "out")
    assert torch.equal(out.pop("lm_head.weight"), stored(case.base)["lm_head.weight"])
    assert_same_bits(
        {name.removeprefix("model."): tensor for name, tensor in out.items()},
        stored(merged_by_peft(of_body, tmp_path / "peft")),
    )


def test_an_embedding_tied_to_the_head_stays_as_it_is(tmp_path):
    case = llama_case(tmp_path, settings={"tie_word_embeddings": True})
    assert "lm_head.weight" not in stored(case.base)
    assert_merges_as_peft_does(case, tmp_path)


def test_plain_transformers_gives_the_logits_of_the_merged_model(tmp_path):
    case = llama_case(tmp_path, dtype=torch.bfloat16, shard_size="20KB")
    ids = torch.arange(10).view(1, 10)
    expected = case.peft_model().merge_and_unload().eval()(input_ids=ids).logits
    merge_checkpoint(case.base, case.adapter, tmp_path / "out")
    merged = auto("AutoModelForCausalLM").from_pretrained(tmp_path / "out").eval()
    assert torch.equal(merged(input_ids=ids).logits, expected)


def test_headers_and_other_tensors_stay_as_they_were(tmp_path):
    case = llama_case(tmp_path, SPPConfig(r=4, target_modules=["q_proj"]), shard_size="20KB")
    merge_checkpoint(case.base, case.adapter, tmp_path / "out")
    before, after = contents(case.base), contents(tmp_path / "out")
    assert before.keys() == after.keys() - {"README.md"}
    for name, content in before.items():
        if name == "config.json":
            config = json.loads(after[name])
            assert len(config.pop(MERGED)) == 1 and config == json.loads(content)
            continue
        if not name.endswith(".safetensors"):
            assert after[name] == content
            continue
        header = 8 + int.from_bytes(content[:8], "little")
        assert after[name][:header] == content[:header] and len(after[name]) == len(content)
    unmerged, merged = stored(case.base), stored(tmp_path / "out")
    changed = {name for name in unmerged if not torch.equal(unmerged[name], merged[name])}
    assert changed == {f"model.layers.{n}.self_attn.q_proj.weight" for n in range(3)}
    # not even a negative zero of a tensor that is not adapted changes
    assert torch.equal(*(one["model.embed_tokens.weight"].view(torch.int32) for one in (unmerged, merged)))


def test_the_report_counts_what_a_comparison_of_the_folders_counts(tmp_path):
    case = llama_case(tmp_path, dtype=torch.float16)
    file = case.adapter / "adapter_model.safetensors"
    # a row of A that is tiny makes no new zeros; one that cancels the weight does
    name = "base_model.model.model.layers.0.mlp.up_proj"
    A, B = load_file(file)[f"{name}.spp_A.weight"], load_file(file)[f"{name}.spp_B.weight"]
    A[0], B[:] = -1.0, 5 / 32
    edit_tensors(file, **{f"{name}.spp_A.weight": A, f"{name}.spp_B.weight": B})
    report = merge_checkpoint(case.base, case.adapter, tmp_path / "out")
    comparison = compare_sparsity(case.base, tmp_path / "out")
    assert report.modules.keys() == comparison.modules.keys()
    for module in report:
        one = comparison[module.name]
        assert (module.zeros_before, module.zeros_after) == (one.zeros_before, one.zeros_after)
        assert (module.lost, module.gained, module.non_finite) == (one.lost, one.gained, one.non_finite)
    assert report["model.layers.0.mlp.up_proj"].gained > 0 == report.lost
    assert report.zeros_after == sum(module.zeros_after for module in report)
    data = report.to_dict()
    assert data["zeros_before"] == report.zeros_before and len(data["modules"]) == len(report) == 21
    assert data["copied"] + len(report) == len(stored(case.base))
    assert "up_proj" in str(report)


def test_a_dry_run_reports_the_same_and_writes_nothing(tmp_path):
    case = llama_case(tmp_path, shard_size="20KB")
    before = contents(tmp_path)
    dry = merge_checkpoint(case.base, case.adapter, tmp_path / "out", dry_run=True).to_dict()
    assert contents(tmp_path) == before and not (tmp_path / "out").exists()
    wet = merge_checkpoint(case.base, case.adapter, tmp_path / "out").to_dict()
    assert dry.pop("dry_run") and not wet.pop("dry_run") and dry == wet


def test_progress_reaches_the_end(tmp_path):
    case = llama_case(tmp_path, shard_size="20KB")
    seen = []
    merge_checkpoint(case.base, case.adapter, tmp_path / "out", progress=lambda *now: seen.append(now))
    size = sum(file.stat().st_size for file in case.base.glob("*.safetensors"))
    assert seen == sorted(seen) and seen[-1] == (size, size)


def test_the_number_of_threads_of_the_caller_stays(tmp_path):
    case = llama_case(tmp_path)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        merge_checkpoint(case.base, case.adapter, tmp_path / "out")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["llava", "gemma3", "qwen2_vl", "paligemma", "internvl"])
def test_a_multimodal_model_is_merged_under_the_names_of_its_checkpoint(tmp_path, kind):
    """Transformers saves it under older names than its modules have."""
    case = save_case(tmp_path, build(kind), SPPConfig(r=2))
    adapted = {module.name for module in merge_checkpoint(case.base, case.adapter, tmp_path / "dry", dry_run=True)}
    names = {name.removesuffix(".weight") for name in stored(case.base)}
    assert adapted and not adapted & names
    report = merge_checkpoint(case.base, case.adapter, tmp_path / "out")
    assert f"in {len(adapted)} modules" in report.base_masks
    assert_same_bits(stored(tmp_path / "out"), stored(merged_by_peft(case, tmp_path / "peft")))

    first = next(iter(report)).tensor
    file = next(file for file in case.base.glob("*.safetensors") if first in load_file(file))
    edit_tensors(file, **{first: torch.ones_like(load_file(file)[first])})
    with pytest.raises(ValueError, match=r"different masks than .*, in 1 of"):
        merge_checkpoint(case.base, case.adapter, tmp_path / "other", check_base="error")
