# SPDX-License-Identifier: Apache-2.0
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, MixtralForCausalLM
from typer.testing import CliRunner

from peft_spp import SPPConfig
from peft_spp.cli import app
from peft_spp.compressed import compress_checkpoint
from peft_spp.inspection import inspect_adapter, inspect_checkpoint
from peft_spp.installing import how_to_install
from peft_spp.merge import merge_checkpoint
from peft_spp.sparsity import sparsity_report

from helpers.tiny import block_linears, prune_, randomize, tiny, tiny_llama
from helpers.tiny_moe import PARAMETERS, experts, tiny_moe


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = tiny_llama()
    for name, layer in block_linears(model).items():
        prune_(layer.weight, "0.6" if name.endswith("down_proj") else "2:4")
    model.model.layers[0].mlp.down_proj.weight.data[3] = 0
    model.model.layers[0].mlp.down_proj.weight.data[:, [1, 5]] = 0
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    return tmp_path / "model"


@pytest.fixture
def adapter(tmp_path: Path, model: Path) -> Path:
    adapted = get_peft_model(tiny_llama(), SPPConfig(r=5, task_type="CAUSAL_LM", modules_to_save=["lm_head"]))
    randomize(adapted)
    with torch.no_grad():
        adapted.base_model.model.model.layers[1].mlp.up_proj.spp_B["default"].weight.zero_()
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def run(*arguments: object, **options):
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)], **options)


def test_the_places_of_zeros_are_counted(model: Path) -> None:
    inspection = inspect_checkpoint(model)
    report = sparsity_report(model)
    assert list(inspection.modules) == list(report.modules) and len(inspection) == 21
    for one in inspection:
        assert one.sparsity == report[one.name]
        zero = ~inspection.nonzero(one.name)
        by_output = zero.double().mean(dim=1)
        assert one.least == pytest.approx(float(by_output.min())) and one.most == pytest.approx(float(by_output.max()))
        assert one.empty_outputs == int(zero.all(dim=1).sum()) and one.empty_inputs == int(zero.all(dim=0).sum())
    special = inspection["model.layers.0.mlp.down_proj"]
    assert special.empty_outputs == 1 and special.empty_inputs >= 2 and special.most == 1.0
    assert inspection.total_sparsity == report.total_sparsity
    assert inspection.size == sum(one.sparsity.numel for one in inspection) * 4


def test_conv1d_weights_are_read_by_output(tmp_path: Path) -> None:
    model = tiny("GPT2LMHeadModel", vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=4)
    model.transformer.h[0].mlp.c_fc.weight.data[:, 7] = 0
    model.save_pretrained(tmp_path)
    one = inspect_checkpoint(tmp_path)["transformer.h.0.mlp.c_fc"]
    assert (one.empty_outputs, one.empty_inputs, one.least, one.most) == (1, 0, 0.0, 1.0)


def test_a_folder_of_safetensors_is_enough(tmp_path: Path) -> None:
    save_file({"some.layer.weight": torch.eye(8)}, tmp_path / "any.safetensors")
    result = run(tmp_path, "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0 and found["total_sparsity"] == 1 - 1 / 8
    assert json.loads(run(tmp_path / "any.safetensors", "--json").stdout)["modules"] == found["modules"]


def test_the_change_is_that_of_the_factors(adapter: Path) -> None:
    inspection = inspect_adapter(adapter)
    assert len(inspection) == 21 and inspection.trained == ("lm_head.weight",)
    total = 0.0
    for one in inspection:
        factors = inspection.factors[one.name].load(torch.float64)
        blocks = [len(part) for part in torch.arange(one.shape[0]).tensor_split(one.r)]
        P = factors.A.repeat_interleave(torch.tensor(blocks), dim=0)
        D = factors.scaling * P * factors.B
        torch.testing.assert_close(inspection.relative_change(one.name), D.float())
        assert one.change == pytest.approx(float(D.square().mean().sqrt()))
        assert one.largest == pytest.approx(float(D.abs().max()))
        total += float(D.square().sum())
    assert inspection.change == pytest.approx(math.sqrt(total / sum(math.prod(one.shape) for one in inspection)))
    assert inspection["model.layers.1.mlp.up_proj"].change == 0 and "1 of them are unchanged" in str(inspection)


def test_an_adapter_tells_the_base_it_was_trained_on(tmp_path: Path) -> None:
    base = tiny_llama()
    for layer in block_linears(base).values():
        prune_(layer.weight, "2:4")
    get_peft_model(base, SPPConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    inspection = inspect_adapter(tmp_path)
    assert {one.mask.pattern for one in inspection if one.mask} == {"2:4"} and "2:4, 50.00 %" in str(inspection)


def test_commands_print_tables_and_json(model: Path, adapter: Path) -> None:
    for source, kind in ((model, "checkpoint"), (adapter, "adapter")):
        table = run(source)
        assert table.exit_code == 0 and "q_proj" in table.stdout
        found = json.loads(run(source, "--json").stdout)
        assert found["kind"] == kind and len(found["modules"]) == 21
    one = json.loads(run(model, "--json", "--modules", "q_proj", "--pattern", "1:4").stdout)
    assert len(one["modules"]) == 3 and {module["pattern"] for module in one["modules"]} == {"unstructured"}


def test_pictures_are_drawn(tmp_path: Path, model: Path, adapter: Path) -> None:
    pytest.importorskip("matplotlib")
    for source in (model, adapter):
        file = tmp_path / f"{source.name}.png"
        result = run(source, "--plot", file, "--plot-module", "model.layers.2.self_attn.k_proj")
        assert result.exit_code == 0, result.output
        assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 20_000


def test_a_picture_without_matplotlib_names_the_extra(tmp_path: Path, model: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run(model, "--plot", tmp_path / "out.png")
    assert result.exit_code == 2 and how_to_install("plot") in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plot", "out.txt"], "must end in .png"),
        (["--plot", "missing/out.png"], "the folder missing does not exist"),
        (["--pattern", "4:2"], "4:2"),
        (["--modules", "nothing"], "nothing"),
        (["--modules", "q_proj", "--modules", "vv_proj"], "'vv_proj'"),
        (["--plot-module", "model.layers.0.mlp.up_proj"], "does nothing without --plot"),
    ],
)
def test_refusals_say_why_in_one_line(model: Path, arguments: list[str], message: str) -> None:
    pytest.importorskip("matplotlib")
    result = run(model, *arguments)
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1


def test_an_adapter_next_to_a_configuration_is_no_model(model: Path, adapter: Path) -> None:
    (adapter / "config.json").write_bytes((model / "config.json").read_bytes())
    assert json.loads(run(adapter, "--json").stdout)["kind"] == "adapter"
    # Transformers saves adapters into the folder of their model
    for file in adapter.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    assert json.loads(run(model, "--json").stdout)["kind"] == "checkpoint"


def test_a_compressed_weight_has_the_size_that_it_takes(tmp_path: Path, model: Path) -> None:
    report = compress_checkpoint(model, tmp_path / "small")
    inspection, dense = inspect_checkpoint(tmp_path / "small"), inspect_checkpoint(model)
    for one in report:
        assert inspection[one.name].size == one.compressed_bytes < dense[one.name].size
    loaded = inspect_checkpoint(AutoModelForCausalLM.from_pretrained(tmp_path / "small"))
    assert {one.name: one.size for one in loaded} == {one.name: one.size for one in inspection}


def test_modules_that_share_a_cell_count_by_their_weights(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from peft_spp.inspection import plots

    model = tiny("GPT2LMHeadModel", vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=4)
    adapted = get_peft_model(model, SPPConfig(r=4, task_type="CAUSAL_LM"))
    randomize(adapted)
    adapted.save_pretrained(tmp_path)
    inspection = inspect_adapter(tmp_path)
    shown = plots.changes_by_layer_and_kind(inspection)["c_proj"]["0"]
    both = [inspection.relative_change(one.name).double() for one in inspection if one.name.endswith("c_proj")]
    expected = math.sqrt(sum(float((D**2).sum()) for D in both) / sum(D.numel() for D in both))
    assert len({D.numel() for D in both}) == 2 and shown == pytest.approx(expected, rel=1e-5)


def test_what_is_asked_of_a_model_is_refused_for_an_adapter(adapter: Path) -> None:
    result = run(adapter, "--modules", "q_proj")
    assert result.exit_code == 2 and "is an adapter" in result.stderr


def test_an_unknown_layer_to_draw_is_named(tmp_path: Path, model: Path, adapter: Path) -> None:
    pytest.importorskip("matplotlib")
    for source in (model, adapter):
        result = run(source, "--plot", tmp_path / "out.png", "--plot-module", "nowhere")
        assert result.exit_code == 2 and "'nowhere'" in result.stderr


def test_an_adapter_of_another_method_is_named(tmp_path: Path) -> None:
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    result = run(tmp_path)
    assert result.exit_code == 2 and "LORA" in result.stderr


def test_an_adapter_is_inspected_by_its_weights_too(adapter: Path, tmp_path: Path) -> None:
    assert run(adapter / "adapter_model.safetensors").stdout == run(adapter).stdout != ""
    (adapter / "adapter_config.json").rename(tmp_path / "settings.json")
    for source in (adapter, adapter / "adapter_model.safetensors"):
        result = run(source)
        assert result.exit_code == 2 and "is not a PEFT adapter: it has no adapter_config.json" in result.stderr


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    result = run(tmp_path / "nowhere")
    assert result.exit_code == 2 and "nowhere" in result.stderr


@pytest.fixture
def of_experts(tmp_path: Path) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """A mixture, an adapter of it, and what each expert's weight is multiplied with, less 1."""
    tiny_moe("mixtral", pattern="2:4").save_pretrained(tmp_path / "base")
    model = MixtralForCausalLM.from_pretrained(tmp_path / "base")
    config = SPPConfig(
        r=5, target_parameters=PARAMETERS, rank_pattern={"experts.down_proj": 3}, target_modules=["q_proj"]
    )
    adapted = get_peft_model(model, config)
    randomize(adapted)
    untrained = adapted.base_model.model.model.layers[1].mlp.experts
    assert untrained.parameter_name == "down_proj"
    with torch.no_grad():
        untrained.spp_B["default"].weight[2 * 32 : 3 * 32] = 0  # its third expert
    adapted.save_pretrained(tmp_path / "adapter")
    before = {name: one.double().clone() for name, one in experts(adapted).items()}
    after = experts(adapted.merge_and_unload())
    changes = {
        f"{name}.{index}": after[name][index].double() / weight - 1
        for name, stack in before.items()
        for index, weight in enumerate(stack)
    }
    return tmp_path / "base", tmp_path / "adapter", changes


def test_experts_are_inspected_one_by_one(of_experts) -> None:
    base, adapter, changes = of_experts
    inspection = inspect_adapter(adapter, base=base)
    assert len(inspection) == 2 * 2 * 4 + 2 and changes.keys() < inspection.modules.keys()
    for name, change in changes.items():
        one, kept = inspection[name], ~change.isnan()
        assert one.r == (3 if "down_proj" in name else 5) and one.scaling == 32 / one.r
        assert one.shape == change.shape and one.mask is not None and one.mask.pattern == "2:4"
        torch.testing.assert_close(inspection.relative_change(name)[kept].double(), change[kept], atol=1e-5, rtol=1e-5)
        assert one.change == pytest.approx(float(inspection.relative_change(name).square().mean().sqrt()))
        assert one.zeros == int((~kept).sum()) == change.numel() // 2
    assert inspection["model.layers.1.mlp.experts.down_proj.2"].change == 0
    assert "1 of them are unchanged" in str(inspection) and "50.00 %" in str(inspection)
    # nothing but the configuration is read of the base model that the adapter names
    (base / "model.safetensors").unlink()
    uncounted = inspect_adapter(adapter)
    assert {name: replace(one, zeros=None) for name, one in inspection.modules.items()} == uncounted.modules
    assert "merged zeros" not in str(uncounted) and "merged zeros" in str(inspection)


def test_the_command_inspects_experts(tmp_path: Path, of_experts) -> None:
    base, adapter, _ = of_experts
    found = json.loads(run(adapter, "--base", base, "--json").stdout)
    merged = merge_checkpoint(base, adapter, tmp_path / "merged").to_dict()
    zeros = {one["name"]: (one["r"], one["scaling"], one["zeros_after"]) for one in merged["modules"]}
    assert zeros == {one["name"]: (one["r"], one["scaling"], one["zeros"]) for one in found["modules"]}
    table = run(adapter)
    assert table.exit_code == 0 and "model.layers.1.mlp.experts.gate_up_proj.3" in table.stdout
    base.rename(tmp_path / "elsewhere")
    lost = run(adapter)
    assert lost.exit_code == 2 and str(base) in lost.stderr and "(--base on the command line)" in lost.stderr
    assert run(adapter, "--base", tmp_path / "elsewhere").exit_code == 0


def test_zeros_of_linear_layers_are_counted_with_a_base(model: Path, adapter: Path) -> None:
    sparse = inspect_checkpoint(model)
    inspection = inspect_adapter(adapter, base=model)
    assert {one.name: one.zeros for one in inspection} == {one.name: one.sparsity.zeros for one in sparse}


def test_a_base_of_a_model_is_refused(model: Path) -> None:
    result = run(model, "--base", model)
    assert result.exit_code == 2 and "--base applies to adapters" in result.stderr


def test_a_picture_of_an_expert_is_drawn(tmp_path: Path, of_experts) -> None:
    pytest.importorskip("matplotlib")
    _, adapter, changes = of_experts
    assert run(adapter, "--plot", tmp_path / "a.png", "--plot-module", next(iter(changes))).exit_code == 0
    assert (tmp_path / "a.png").stat().st_size > 20_000
