# SPDX-License-Identifier: Apache-2.0
"""
The pruning methods side by side: `python -m benchmarks.pruning`.

A small Llama is trained on real text: the text files of a folder (`--data`), or the documentation that every CPython
ships. Each method prunes it at the same request from the same calibration data, which is training text, and what is
compared is the perplexity on held-out text. Nothing is fine-tuned afterwards.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any

import torch
import typer
from datasets import Dataset  # type: ignore[import-untyped]
from rich.console import Console
from transformers import PreTrainedModel, set_seed

from peft_spp.demo.check_saved_models import perplexity
from peft_spp.demo.config import DemoConfig
from peft_spp.demo.data import join_texts, split_topics, token_blocks, train_tokenizer
from peft_spp.demo.display import make_progress, quiet_libraries
from peft_spp.demo.training import ProgressCallback, train_dense
from peft_spp.pruning.by_block import prune_model
from peft_spp.pruning.registry import METHODS
from peft_spp.sparsity import sparsity_report

from .harness import BenchmarkResult, Case, make_console, print_table
from .harness import options as opt


NAME = "pruning"
DENSE = "dense"
REQUESTS: tuple[dict[str, Any], ...] = ({"pattern": "2:4"}, {"sparsity": 0.5}, {"pattern": "2:8"}, {"sparsity": 0.75})

# larger than the model of the demo, so that each layer has some weights to spare
SIZE = DemoConfig(hidden_size=128, intermediate_size=352, num_layers=4, dense_steps=700, dense_learning_rate=5e-3)
QUICK_SIZE = DemoConfig(
    hidden_size=32, intermediate_size=64, num_layers=1, vocab_size=300, block_size=32, dense_steps=2, batch_size=2
)

app = typer.Typer(add_completion=False)


@app.command()
def main(
    data: Annotated[
        Path | None,
        typer.Option(
            help="A folder of text files (*.txt, *.md, *.rst) to train on; by default Python's documentation.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    calibration_batches: Annotated[int, typer.Option(min=1, help="Batches of training text to calibrate with.")] = 8,
    threads: opt.ThreadsOption = None,
    seed: Annotated[list[int], typer.Option(min=0, help="Seed of the split and the training. May be repeated.")] = [0],  # noqa: B006
    machine: opt.MachineOption = None,
    output_dir: opt.OutputOption = opt.DEFAULT_OUTPUT,
    quick: opt.QuickOption = False,
) -> None:
    """Compare the perplexity of a small Llama pruned with each method."""
    run = opt.start_run(NAME, opt.Device.cpu, machine, output_dir, threads, quick)
    size = replace(QUICK_SIZE if quick else SIZE, calibration_batches=calibration_batches)
    texts = topics if data is None else read_texts(data)
    console = make_console()
    result = run.new_result(
        DENSE,
        size={**vars(size), "seed": None},
        text="CPython's pydoc_data.topics" if data is None else f"{len(texts)} text files",
    )
    for one in seed:
        result.cases += measure(replace(size, seed=one), texts, console)
        result.save(run.json_path)
    report(result)
    console.print(f"Written: {run.json_path}")


def read_texts(folder: Path) -> dict[str, str]:
    """
    Read all text files of a folder and its folders.

    Raises:
        typer.BadParameter: If there is none.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".txt", ".md", ".rst") and path.is_file())
    if not files:
        raise typer.BadParameter(f"{folder} has no *.txt, *.md or *.rst files.", param_hint="--data")
    return {str(path.relative_to(folder)): path.read_text(encoding="utf-8", errors="replace") for path in files}


def measure(config: DemoConfig, texts: dict[str, str], console: Console) -> list[Case]:
    """
    Train a model, prune copies of it, and measure them.

    Args:
        config (`DemoConfig`): Sizes, steps and seed.
        texts (`dict[str, str]`): The texts by their names; some are held out.
        console (`Console`): Where the training is shown.

    Returns:
        `list[Case]`: A case for each request, with the perplexity and the sparsity of each model.
    """
    set_seed(config.seed)
    train_texts, held_out_texts = split_topics(texts, config.held_out_fraction, config.seed)
    tokenizer = train_tokenizer(train_texts, config.vocab_size)
    dataset = token_blocks(tokenizer, join_texts(train_texts), config.block_size)
    held_out = torch.tensor(token_blocks(tokenizer, join_texts(held_out_texts), config.block_size)["input_ids"])
    with tempfile.TemporaryDirectory() as folder, quiet_libraries(), make_progress(console) as progress:
        callback = ProgressCallback(progress, f"Train a small Llama, seed {config.seed}")
        model = train_dense(config, tokenizer, dataset, Path(folder), callback).eval()

    batches = calibration_data(dataset, config)
    dense = {"perplexity": perplexity(model, held_out), "sparsity": 0.0}
    cases = []
    for request in REQUESTS:
        case = Case({"request": next(iter(request.values())), "seed": config.seed}, values={DENSE: dense})
        for method in METHODS:
            pruned = prune(method, model, batches, request)
            sparsity = sparsity_report(pruned).total_sparsity
            case.values[method] = {"perplexity": perplexity(pruned, held_out), "sparsity": sparsity}
        cases.append(case)
    return cases


def calibration_data(dataset: Dataset, config: DemoConfig) -> list[torch.Tensor]:
    """Batches of the training data, in a random order."""
    size = min(len(dataset), config.calibration_batches * config.batch_size)
    sample = dataset.shuffle(seed=config.seed).select(range(size))
    return [torch.tensor(batch["input_ids"]) for batch in sample.iter(config.batch_size)]


def prune(
    method: str, model: PreTrainedModel, batches: Sequence[torch.Tensor], request: dict[str, Any]
) -> PreTrainedModel:
    """A copy of the model, pruned."""
    pruned = copy.deepcopy(model)
    prune_model(pruned, METHODS[method](**request), batches)
    return pruned


def report(result: BenchmarkResult) -> None:
    """Print the perplexities as one table."""
    rows = []
    for case in result.cases:
        request = case.parameters["request"]
        label = request if isinstance(request, str) else f"{request:.0%}"
        cells = [f"{case.values[name]['perplexity']:.2f}" for name in (DENSE, *METHODS)]
        rows.append([str(case.parameters["seed"]), label, *cells])
    headings = ["seed", "pruned to", "dense", *(method.name for method in METHODS.values())]
    print_table(make_console(), headings, rows, numbers_from=2)


if __name__ == "__main__":
    app()
