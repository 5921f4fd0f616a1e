# SPDX-License-Identifier: Apache-2.0
"""A pruning method is known by its line in the registry: from disk, in memory, to the command and to the benchmark."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import pruning as benchmark
from peft_spp.cli import app
from peft_spp.pruning import prune_checkpoint
from peft_spp.pruning.by_block import prune_model
from peft_spp.pruning.layers import LinearLayer, apply_mask, weight_matrix
from peft_spp.pruning.mask import pruning_mask
from peft_spp.pruning.methods import PruningMethod
from peft_spp.pruning.options import OPTIONS, option
from peft_spp.pruning.registry import METHODS, create_method, option_names
from peft_spp.sparsity import sparsity_report

from helpers.tiny import tiny_llama


@dataclass(frozen=True)
class LargestOptions:
    keep_largest: bool = option(False, "Largest: prune the smallest instead.")


@dataclass(frozen=True)
class Largest(LargestOptions, PruningMethod):
    """The largest weights, or with `keep_largest` the smallest, are pruned."""

    name = "largest"
    paper = "https://example.org"
    statistics = None

    def prune(self, name: str, layer: LinearLayer, statistic: torch.Tensor | None) -> None:
        scores = weight_matrix(layer).abs() * (1 if self.keep_largest else -1)
        mask = pruning_mask(scores, pattern=self.pattern, sparsity=self.sparsity, comparison_group="layer")
        apply_mask(layer, mask)

    def comparison_size(self, out_features: int, in_features: int) -> int:
        return out_features * in_features


def test_a_line_in_the_registry_is_all_that_a_method_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "largest", Largest)
    model = tiny_llama()
    model.save_pretrained(tmp_path / "dense")
    report = prune_checkpoint(tmp_path / "dense", tmp_path / "disk", method="largest", pattern="2:4")
    assert report.settings["method"] == "largest" and report.settings["keep_largest"] is False
    assert "keep_largest: False" in (tmp_path / "disk" / "README.md").read_text(encoding="utf-8")
    pruned = benchmark.prune("largest", model, [], {"pattern": "2:4"})
    for name, weight in tiny_llama().from_pretrained(tmp_path / "disk").state_dict().items():
        assert torch.equal(weight, pruned.state_dict()[name]), name
    prune_model(model, Largest("2:4", keep_largest=True))
    zero = {name: weight == 0 for name, weight in pruned.state_dict().items() if "proj" in name}
    assert zero and all(torch.equal(model.state_dict()[name] != 0, where) for name, where in zero.items())


def test_the_options_of_a_method_are_those_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "largest", Largest)
    monkeypatch.setitem(OPTIONS, "largest", LargestOptions)
    tiny_llama().save_pretrained(tmp_path / "dense")
    folders = [str(tmp_path / "dense"), str(tmp_path / "out")]
    options = ["--method", "largest", "--pattern", "2:4", "--keep-largest", "--damping", "0.5", "--json"]
    result = CliRunner().invoke(app, ["prune", *folders, *options])
    assert result.exit_code == 0, result.output
    settings = json.loads(result.stdout)["settings"]
    assert settings["method"] == "largest" and settings["keep_largest"] is True and "damping" not in settings
    text = CliRunner().invoke(app, ["prune", "--help"], env={"COLUMNS": "150"}).output
    assert "prune the smallest instead" in text and "--damping" in text
    assert "--method" in CliRunner().invoke(app, ["prune", *folders, "--method", "other"]).output


def test_an_option_of_another_method_is_refused(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "dense")
    with pytest.raises(TypeError, match="method='magnitude' has no option 'damping': it has none"):
        prune_checkpoint(tmp_path / "dense", tmp_path / "out", method="magnitude", pattern="2:4", damping=0.1)
    with pytest.raises(TypeError, match="'sparsegpt' has no option 'speed': it has damping, block_size"):
        prune_checkpoint(tmp_path / "dense", tmp_path / "out", method="sparsegpt", pattern="2:4", speed=0.1)
    assert not (tmp_path / "out").exists()


def test_each_method_has_its_options() -> None:
    assert OPTIONS.keys() == METHODS.keys()
    for name, method in METHODS.items():
        assert issubclass(method, OPTIONS[name]) or not option_names(method), name
        assert option_names(method) == tuple(one.name for one in fields(OPTIONS[name])), name


@pytest.mark.parametrize("name", METHODS)
def test_each_method_prunes_a_layer_to_its_pattern(name: str) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 8, bias=False)
    inputs = torch.randn(64, 16)
    method = create_method(name, "2:4", None, {})
    statistic = None
    if method.statistics is not None:
        with method.statistics({"layer": layer}) as statistics:
            layer(inputs)
        statistic = statistics.compute()["layer"]
    with torch.no_grad():
        method.prune("layer", layer, statistic)
    assert sparsity_report({"layer.weight": layer.weight.detach()}).all_satisfy("2:4")
    assert not (layer.weight.signbit() & (layer.weight == 0)).any()
    assert method.name and method.paper.startswith("https://") and isinstance(option_names(type(method)), tuple)
