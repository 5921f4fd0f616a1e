# SPDX-License-Identifier: Apache-2.0
"""
Merging an adapter into a checkpoint on disk, next to copying its files: `python -m benchmarks.merge`.

The checkpoint has the names and shapes of a Llama of about 2B parameters, in bfloat16, its blocks pruned to 2:4, as
many of them as the size asks for. Each round copies its files (`shutil.copyfile` and `fsync`) and merges an adapter of
random factors into it, one after the other, each in a process of its own and after what was written before is on the
disk. The files of the checkpoint are in the page cache for both, if there is memory for them.

- Seconds are those of the copy or the merge, without the start of the process and its imports.
- `peak_bytes` is the most memory that the process had resident, beyond what it had after its imports.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file

from .harness import (
    BenchmarkResult,
    Case,
    describe_environment,
    format_bytes,
    format_ratio,
    make_console,
    print_table,
    result_path,
)
from .harness import options as opt
from .harness.environment import machine_slug
from .harness.plots import BLUE, GRAY, machine_note, panels, save_figure


NAME = "merge"
REFERENCE = "copy"
LABELS = {"copy": "copy the files", "merge": "merge"}
HIDDEN, INTERMEDIATE, KEY_VALUE, VOCABULARY = 2560, 6912, 640, 32000
BLOCK = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEY_VALUE, HIDDEN),
    "self_attn.v_proj": (KEY_VALUE, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
R = 16
# the base, a copy or a merged model, and what the file system keeps of one that was just deleted
SPACE_FACTOR = 3

app = typer.Typer(add_completion=False)


@app.command()
def main(
    size_gb: Annotated[float, typer.Option(min=0.5, help="About how many gigabytes the checkpoint takes.")] = 4.0,
    shards: Annotated[int, typer.Option(min=1, help="In how many files.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="How many times each is measured.")] = 3,
    folder: Annotated[
        Path | None, typer.Option(help="Where to make the files; by default the temporary folder.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The file of the result; by default in benchmarks/results.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and factors.")] = 0,
    plot_only: opt.PlotOnlyOption = None,
) -> None:
    """Time a merge from disk to disk next to a copy of the same files, and measure its memory."""
    if plot_only is not None:
        draw(opt.load_result(plot_only, NAME), plot_only.with_suffix(".png"))
        return
    device = torch.device("cpu")
    path = out or result_path(Path("benchmarks/results"), machine_slug(device), NAME)
    place = folder or Path(tempfile.gettempdir())
    free, needed = shutil.disk_usage(place).free, int(size_gb * 1e9 * SPACE_FACTOR)
    if free < needed:
        raise typer.BadParameter(f"{place} has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} are needed.")

    console = make_console()
    with tempfile.TemporaryDirectory(prefix="merge-benchmark-", dir=place) as made:
        base, adapter = Path(made, "base"), Path(made, "adapter")
        largest = make_model(base, adapter, size_gb, shards, seed)
        size = sum(file.stat().st_size for file in base.iterdir())
        settings = {"size_bytes": size, "shards": shards, "largest_tensor_bytes": largest, "r": R, "seed": seed}
        result = BenchmarkResult(NAME, REFERENCE, settings, describe_environment(device))
        result.cases.append(measure(base, adapter, Path(made, "out"), rounds))
    result.save(path)
    draw(result, path.with_suffix(".png"))
    report(result)
    console.print(f"Written: {path}")


def make_model(base: Path, adapter: Path, size_gb: float, shards: int, seed: int) -> int:
    """
    Make a checkpoint of blocks that are pruned to 2:4, and an adapter of it.

    Args:
        base (`Path`): The folder of the checkpoint.
        adapter (`Path`): The folder of the adapter.
        size_gb (`float`): About how many gigabytes the checkpoint takes.
        shards (`int`): In how many files.
        seed (`int`): Seed of weights and factors.

    Returns:
        `int`: The bytes of the largest tensor.
    """
    torch.manual_seed(seed)
    for folder in (base, adapter):
        folder.mkdir()
    shapes = dict(_shapes(size_gb))
    values = torch.randn(2 * max(rows * columns for rows, columns in shapes.values())).bfloat16()
    values.view(-1, 4)[:, :2] = 0
    names, weight_map = list(shapes), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        held = names[len(names) * shard // shards : len(names) * (shard + 1) // shards]
        save_file({name: _cut_out(values, shapes[name]) for name in held}, base / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(held, file))
    _write_json(base / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}
    _write_json(base / "config.json", config)

    factors = {}
    for name, (rows, columns) in shapes.items():
        if ".layers." in name:
            prefix = f"base_model.model.{name.removesuffix('.weight')}"
            factors[f"{prefix}.spp_A.weight"] = 0.1 * torch.randn(R, columns)
            factors[f"{prefix}.spp_B.weight"] = 0.1 * torch.randn(rows, 1)
    save_file(factors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    _write_json(adapter / "adapter_config.json", {"peft_type": "SPP", "r": R, "spp_alpha": 32})
    return max(2 * rows * columns for rows, columns in shapes.values())


def _shapes(size_gb: float) -> Iterator[tuple[str, tuple[int, int]]]:
    embeddings = 2 * VOCABULARY * HIDDEN
    block = sum(rows * columns for rows, columns in BLOCK.values())
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(max(1, round((size_gb * 1e9 / 2 - embeddings) / block))):
        for name, shape in BLOCK.items():
            yield f"model.layers.{layer}.{name}.weight", shape
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def _cut_out(values: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """A weight out of random values, each time from another place that is a multiple of 4, for the groups."""
    numel = shape[0] * shape[1]
    start = 4 * int(torch.randint((len(values) - numel) // 4 + 1, ()))
    return values[start : start + numel].clone().view(shape)


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content))


_WORKER = "import sys; from benchmarks.merge import run_once; run_once(*sys.argv[1:])"


def measure(base: Path, adapter: Path, out: Path, rounds: int) -> Case:
    """
    Copy and merge alternately, each in a process of its own, after a round that is not kept.

    Args:
        base (`Path`): The folder of the checkpoint.
        adapter (`Path`): The folder of the adapter.
        out (`Path`): The folder that is written to, and removed after each.
        rounds (`int`): How many times each is measured.

    Returns:
        `Case`: Seconds and peak memory of both.
    """
    case = Case({}, {name: [] for name in LABELS})
    for number in range(rounds + 1):
        for name in LABELS:
            done = subprocess.run(
                [sys.executable, "-c", _WORKER, name, str(base), str(adapter), str(out)],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                cwd=Path(__file__).parents[1],
            )
            shutil.rmtree(out)
            os.sync()
            seen = json.loads(done.stdout)
            if number:
                case.samples[name].append(seen["seconds"])
                peak = case.values.setdefault(name, {"peak_bytes": 0.0})
                peak["peak_bytes"] = max(peak["peak_bytes"], seen["peak_bytes"])
    return case


def run_once(name: str, base: str, adapter: str, out: str) -> None:
    """
    Copy or merge in this process, and print the seconds and the peak memory as JSON.

    Args:
        name (`str`): `"copy"` or `"merge"`.
        base (`str`): The folder of the checkpoint.
        adapter (`str`): The folder of the adapter.
        out (`str`): The folder to write to.
    """
    from peft_spp.merge import merge_checkpoint

    before, begin = _peak_memory(), time.perf_counter()
    if name == "copy":
        _copy_durably(Path(base), Path(out))
    else:
        merge_checkpoint(base, adapter, out)
    seconds = time.perf_counter() - begin
    print(json.dumps({"seconds": seconds, "peak_bytes": _peak_memory() - before}))


def _copy_durably(source: Path, target: Path) -> None:
    target.mkdir()
    for file in sorted(source.iterdir()):
        shutil.copyfile(file, target / file.name)
        with (target / file.name).open("r+b") as copied:
            os.fsync(copied.fileno())


def _peak_memory() -> int:
    """The most memory that this process had resident, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Linux counts the parent into ru_maxrss
        match = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)
        if match:
            return int(match[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def report(result: BenchmarkResult) -> None:
    """Print the result as a table."""
    case, size = result.cases[0], result.settings["size_bytes"]
    rows = []
    for name, label in LABELS.items():
        summary = case.summary(name)
        rows.append(
            [
                label,
                f"{summary.median:.2f} ({summary.minimum:.2f}–{summary.maximum:.2f})",
                f"{size / summary.median / 1e9:.2f}",
                format_ratio(case.ratio(name, result.reference)),
                format_bytes(case.values[name]["peak_bytes"]),
            ]
        )
    console = make_console()
    headings = ["", "s, median (extremes)", "GB/s", "× copy (quartiles)", "peak memory"]
    print_table(console, headings, rows, numbers_from=1)
    largest = format_bytes(result.settings["largest_tensor_bytes"])
    console.print(f"{size / 1e9:.2f} GB in {result.settings['shards']} files; the largest tensor takes {largest}")


def draw(result: BenchmarkResult, path: Path) -> None:
    """Draw the seconds and the peak memory of both, next to what we want of them."""
    case, settings = result.cases[0], result.settings
    size = f"{settings['size_bytes'] / 1e9:.1f} GB in {settings['shards']} files"
    note = f"Left of the dashed lines is what we want of the merge. {machine_note(result.environment)}"
    figure, ((time_axes, memory_axes),) = panels(1, 2, f"Merging {size} from disk to disk", note, panel_height=1.5)
    labels, colors = list(LABELS.values()), [GRAY, BLUE]
    summaries = [case.summary(name) for name in LABELS]
    medians = [summary.median for summary in summaries]
    extremes = [[s.median - s.minimum for s in summaries], [s.maximum - s.median for s in summaries]]
    time_axes.barh(labels, medians, xerr=extremes, color=colors, height=0.6)
    time_axes.set_xlabel("seconds, median and extremes")
    memory = [case.values[name]["peak_bytes"] / 2**20 for name in LABELS]
    memory_axes.barh(labels, memory, color=colors, height=0.6)
    memory_axes.set_xlabel("peak memory beyond the imports, MiB")
    limits = (2 * medians[0], (settings["largest_tensor_bytes"] + 500e6) / 2**20)
    for axes, limit in zip((time_axes, memory_axes), limits, strict=True):
        axes.axvline(limit, color="black", linewidth=1.0, linestyle=(0, (4, 2)))
        axes.set_xlim(left=0)
        axes.invert_yaxis()
        axes.grid(visible=True, axis="x")
        axes.grid(visible=False, axis="y")
    memory_axes.set_yticklabels([])
    save_figure(figure, path)


if __name__ == "__main__":
    app()
