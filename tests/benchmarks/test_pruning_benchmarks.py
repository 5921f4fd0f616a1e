# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import pruning, semi_structured


RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def test_a_quick_run_measures_all_methods(tmp_path):
    pytest.importorskip("trl")
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(12):
        (texts / f"{number}.txt").write_text(f"The text of page {number}. " + f"It says {number * 7}. " * 60)
    arguments = ["--quick", "--data", str(texts), "--output-dir", str(tmp_path), "--machine", "here"]
    result = CliRunner().invoke(pruning.app, arguments)
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "here" / "pruning-quick.json").read_text())
    assert [case["parameters"]["request"] for case in written["cases"]] == ["2:4", 0.5, "2:8", 0.75]
    for case, sparsity in zip(written["cases"], (0.5, 0.5, 0.75, 0.75), strict=True):
        assert set(case["values"]) == {"dense", *pruning.METHODS}
        assert all(case["values"][method]["sparsity"] == sparsity for method in pruning.METHODS)


def test_a_folder_without_texts_is_refused(tmp_path):
    result = CliRunner().invoke(pruning.app, ["--data", str(tmp_path)])
    assert result.exit_code == 2 and "has no" in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize("request_", ["2:4", 0.75])
def test_the_committed_results_order_the_methods_as_the_papers_do(request_):
    files = list(RESULTS.glob("*/pruning.json"))
    assert files
    for file in files:
        cases = [case for case in json.loads(file.read_text())["cases"] if case["parameters"]["request"] == request_]
        assert cases
        for case in cases:
            perplexity = {name: values["perplexity"] for name, values in case["values"].items()}
            assert perplexity["dense"] < perplexity["sparsegpt"] <= perplexity["wanda"] < perplexity["magnitude"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_nothing_is_written(tmp_path):
    result = CliRunner().invoke(semi_structured.app, ["--quick", "--output-dir", str(tmp_path)])
    assert result.exit_code == 2 and "CUDA device" in result.output and not list(tmp_path.iterdir())
