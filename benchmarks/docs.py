# SPDX-License-Identifier: Apache-2.0
"""
The tables of `docs/performance.md` and `docs/inference.md`, from results:
`python -m benchmarks.docs benchmarks/results/<machine>`.

Between `<!-- NAME:begin -->` and `<!-- NAME:end -->` in a page stands the table of the benchmark NAME; of a second
machine, whose folder is MACHINE, between marks with the name `NAME@MACHINE`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from peft_spp.durable import write_text

from .competitors import COMPETITORS
from .harness import BenchmarkResult, Case, format_bytes, format_ratio
from .mask_record import LAYOUTS as MASK_LAYOUTS
from .other_layers import LABELS as OTHER_LABELS
from .passes import LABELS as PASSES


PAGE = Path("docs/performance.md")
INFERENCE = Path("docs/inference.md")

app = typer.Typer(add_completion=False)


@app.command()
def main(
    results: Annotated[
        Path, typer.Argument(help="The folder of one machine's results.", exists=True, file_okay=False)
    ],
    page: Annotated[Path, typer.Option(help="The page to write the tables of speed into.", exists=True)] = PAGE,
    inference: Annotated[
        Path, typer.Option(help="The page to write the tables of compressed weights into.", exists=True)
    ] = INFERENCE,
) -> None:
    """Write the tables of results into the pages on performance and on running sparse models."""
    for file, tables in ((page, TABLES), (inference, INFERENCE_TABLES)):
        text = file.read_text()
        for name, make in tables.items():
            path = results / f"{name}.json"
            if path.is_file():
                of_machine = f"{name}@{results.name}"
                mark = of_machine if f"<!-- {of_machine}:begin -->" in text else name
                text = put(text, mark, make(BenchmarkResult.load(path, name)))
                typer.echo(f"{name}: from {path}")
        write_text(file, text)


def put(text: str, name: str, table: str) -> str:
    """Replace what stands between the marks of a name."""
    marked = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
    if not marked.search(text):
        raise typer.BadParameter(
            f"The page has no marks for {name!r}: add <!-- {name}:begin --> and <!-- {name}:end -->."
        )
    return marked.sub(lambda match: f"{match[1]}{table}\n{match[2]}", text)


def layer_table(result: BenchmarkResult) -> str:
    names = [name for name in ("matmuls", *result.settings["competitors"]) if name != result.reference]
    rows = []
    for case in result.cases:
        (m, n), tokens = case.parameters["shape"], case.parameters["tokens"]
        share = case.values["spp"]["share_beyond_matmuls"]
        rows.append(
            [f"{m}×{n}", tokens, case.parameters["precision"], *_ratios(case, names, result), f"{max(share, 0):.0%}"]
        )
    return _table(["W", "tokens", "", *map(_label, names), "SPP beyond the matmuls"], rows, result)


def passes_table(result: BenchmarkResult) -> str:
    rows = []
    for case in result.cases:
        (m, n), times = (
            case.parameters["shape"],
            {name: f"{case.summary(name).median * 1e3:.2f} ms" for name in PASSES},
        )
        for name in PASSES:
            if name != result.reference:
                times[name] += f"; {format_ratio(case.ratio(name, result.reference))}"
        rows.append([f"{m}×{n}", case.parameters["precision"], *times.values()])
    labels = [label if name == result.reference else f"{label}; ÷ copy" for name, label in PASSES.items()]
    return _table(["W", "", *labels], rows, result)


def training_step_table(result: BenchmarkResult) -> str:
    names = [name for name in result.settings["competitors"] if name != result.reference]
    rows = [
        [
            case.parameters["precision"],
            _on_off(case),
            f"{case.summary('lora').median:.2f} s",
            *_ratios(case, names, result),
        ]
        for case in result.cases
    ]
    return _table(["", "checkpointing", "LoRA", *map(_label, names)], rows, result)


def step_profile_table(result: BenchmarkResult) -> str:
    kinds = result.settings["kinds"]
    rows = []
    for case in result.cases:
        reference = sum(case.values[result.reference].values())
        for name, values in case.values.items():
            seconds = [f"{values[kind]:.2f} s" for kind in kinds]
            total = sum(values.values())
            rows.append(
                [case.parameters["precision"], _label(name), *seconds, f"{total:.2f} s ({total / reference:.2f}×)"]
            )
    return _table(["", "", *kinds, "sum (÷ LoRA)"], rows, result)


def memory_table(result: BenchmarkResult) -> str:
    rows = []
    for case in result.cases:
        reference = case.values[result.reference]
        for name in result.settings["competitors"]:
            values = case.values[name]
            rows.append(
                [
                    case.parameters["precision"],
                    _on_off(case),
                    _label(name),
                    *(
                        f"{format_bytes(values[key])} ({values[key] / reference[key]:.2f}×)"
                        for key in ("saved_bytes", "peak_bytes")
                    ),
                ]
            )
    return _table(["", "checkpointing", "", "kept for backward (÷ LoRA)", "peak (÷ LoRA)"], rows, result)


def decode_table(result: BenchmarkResult) -> str:
    tokens = list(dict.fromkeys(case.parameters["tokens"] for case in result.cases))
    names = [name for name in result.settings["competitors"] if name != result.reference]
    rows: dict[tuple[str, str, str], list[str]] = {}
    for name in names:
        for case in result.cases:
            m, n = case.parameters["shape"]
            key = (f"{m}×{n}", case.parameters["precision"], _label(name))
            rows.setdefault(key, []).extend(_ratios(case, [name], result))
    return _table(["W", "", "", *(f"{count} tokens" for count in tokens)], [[*k, *v] for k, v in rows.items()], result)


def merge_table(result: BenchmarkResult) -> str:
    case, settings = result.cases[0], result.settings
    rows = []
    for name in case.samples:
        summary, peak = case.summary(name), case.values[name]["peak_bytes"]
        speed = settings["size_bytes"] / summary.median / 1e9
        seconds = f"{summary.median:.1f} s ({summary.minimum:.1f}–{summary.maximum:.1f})"
        rows.append([name, seconds, f"{speed:.2f} GB/s", format_bytes(peak)])
    size = f"{settings['size_bytes'] / 1e9:.1f} GB in {settings['shards']} shards"
    largest = f"largest tensor {format_bytes(settings['largest_tensor_bytes'])}"
    return _table([f"{size}, {largest}", "median (min–max)", "", "peak memory"], rows, result)


def mask_record_table(result: BenchmarkResult) -> str:
    rows = []
    for case in result.cases:
        values, ratio = case.values["record"], case.ratio("record", result.reference)
        rows.append(
            [
                case.parameters["dtype"],
                MASK_LAYOUTS[case.parameters["layout"]],
                f"{values['gb_per_second']:.1f} GB/s",
                f"{ratio.median:.1f} ({ratio.lower_quartile:.1f}–{ratio.upper_quartile:.1f})",
                f"{values['seconds_llama_7b']:.1f} s",
            ]
        )
    return _table(["", "stored as", "speed", "time ÷ copying it", "Llama-7B"], rows, result)


TABLES: dict[str, Callable[[BenchmarkResult], str]] = {
    "layer": layer_table,
    "layer_long": layer_table,
    "passes": passes_table,
    "training_step": training_step_table,
    "step_profile": step_profile_table,
    "memory": memory_table,
    "decode": decode_table,
    "merge": merge_table,
    "mask_record": mask_record_table,
}


def compressed_layers_table(result: BenchmarkResult) -> str:
    rows, others = [], [name for name in OTHER_LABELS if any(name in case.samples for case in result.cases)]
    for precision in dict.fromkeys(case.parameters["precision"] for case in result.cases):
        for case in result.cases:
            parameters = case.parameters
            if (parameters["precision"], parameters["clock"]) != (precision, "computing") or parameters["task"] == "2":
                continue
            if not parameters["task"].isdigit():
                continue
            m, n = parameters["shape"]
            names = ["compressed", "own dense", "prepacked", "compressed, adapter", *others]
            cells = [
                f"{case.ratio(name, result.reference).median:.2f}" if name in case.samples else "–" for name in names
            ]
            cells[0] = f"**{cells[0]}** ({_spread(case, 'compressed', result)})"
            rows.append([f"{m}×{n}, {precision}", parameters["sparsity"], parameters["task"], *cells])
    headings = [
        "W",
        "zeros",
        "tokens",
        "compressed",
        "own dense kernel",
        "prepacked dense",
        "compressed, unmerged adapter",
        *(OTHER_LABELS[name] for name in others),
    ]
    return _table(headings, rows, result)


def compressed_models_table(result: BenchmarkResult) -> str:
    rows = []
    for case in result.cases:
        tokens = result.settings["new_tokens"] if case.parameters["task"] == "generate" else 1
        median = case.summary(result.reference).median
        dense = f"{tokens / median:.2f} tokens/s" if tokens > 1 else f"{median:.2f} s"
        cells = []
        for name in ("own", "50%", "75%", "2:4"):
            if name not in case.samples:
                cells.append("")
                continue
            ratio = case.ratio(name, result.reference)
            size = case.values[name]["linear_bytes"] / case.values[result.reference]["linear_bytes"]
            cells.append(f"{ratio.median:.2f} ({_spread(case, name, result)}); {size:.2f} of the bytes")
        rows.append([case.parameters["model"], case.parameters["task"], dense, *cells])
    headings = ["model", "task", "PyTorch dense", "own dense kernel", "50 %", "75 %", "2:4"]
    return _table(headings, rows, result)


INFERENCE_TABLES: dict[str, Callable[[BenchmarkResult], str]] = {
    "compressed_layers": compressed_layers_table,
    "compressed_layers_avx2": compressed_layers_table,
    "compressed_models": compressed_models_table,
}


def _spread(case: Case, name: str, result: BenchmarkResult) -> str:
    ratio = case.ratio(name, result.reference)
    return f"{ratio.lower_quartile:.2f}–{ratio.upper_quartile:.2f}"


def _ratios(case: Case, names: list[str], result: BenchmarkResult) -> list[str]:
    """Medians, with the quartiles where they are ours."""
    cells = []
    for name in names:
        if name not in case.samples:
            cells.append("out of memory")
            continue
        ratio = case.ratio(name, result.reference)
        spread = f" ({ratio.lower_quartile:.2f}–{ratio.upper_quartile:.2f})" if name == "spp" else ""
        cells.append(f"{'**' if spread else ''}{ratio.median:.2f}{'**' if spread else ''}{spread}")
    return cells


def _label(name: str) -> str:
    return "3 matmuls" if name == "matmuls" else COMPETITORS[name].style.label


def _on_off(case: Case) -> str:
    return "on" if case.parameters["checkpointing"] else "off"


def _table(headings: list[str], rows: list[list[object]] | list[list[str]], result: BenchmarkResult) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    environment = result.environment
    note = f"Measured with `{environment['command']}`, commit {environment['git']['commit'][:9]}."
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + f"\n\n{note}"


if __name__ == "__main__":
    app()
