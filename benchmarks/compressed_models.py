# SPDX-License-Identifier: Apache-2.0
"""
Whole models on compressed weights, on CPU: `python -m benchmarks.compressed_models`.

Random Llamas in bfloat16 whose linear layers are pruned by magnitude, row by row: one of 1.1 billion parameters, and
eight layers of the shapes of an 8B model. The models take turns in each round. Measured are:

- `generate`: a token through Transformers' `generate`, greedy, after a short prompt;
- `prompt`: a forward pass over a prompt;
- `training step`: SPP on the Llama of `benchmarks.training_step` (98 million parameters, 2:4), its weights dense and
  compressed.

The bytes of the linear weights are recorded as well.

Next to PyTorch's dense layers stand dense ones with a kernel of our own, made as that of the compressed weights: what
they gain is due to the kernel, and what is left is due to the zeros.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_spp import CompressedLinear, compress
from peft_spp.checkpoints.empty_model import default_dtype
from peft_spp.functional.kernels.cpu import bitmask

from .competitors import COMPETITORS
from .dense_tokens import TOKENS, dense_tokens
from .harness import (
    BenchmarkResult,
    Case,
    Contestant,
    format_ratio,
    format_seconds,
    make_console,
    measure_interleaved,
    plots,
    print_table,
)
from .harness import options as opt
from .models import PRECISIONS, build_llama
from .training import TrainingStep, choose_size


NAME = "compressed_models"
REFERENCE = "dense"
LABELS = {
    "dense": "dense, PyTorch",
    "own": "dense, own kernel",
    "50%": "compressed, 50 %",
    "75%": "compressed, 75 %",
    "2:4": "compressed, 2:4",
}
COLORS = {"own": plots.GREEN, "50%": plots.ORANGE, "75%": plots.VERMILLION, "2:4": plots.PURPLE}
PROMPT = 8
# many enough that what a prompt costs, which is the same for all, does not hide the speed of a token
NEW_TOKENS = 64
PROMPTS = [128, 512]

app = typer.Typer(add_completion=False)


class OwnDenseLinear(nn.Linear):
    """A dense layer with our own kernel for few tokens.

    Args:
        layer (`nn.Linear`): The layer, whose weight it shares.
    """

    def __init__(self, layer: nn.Linear) -> None:
        with torch.device("meta"):
            super().__init__(layer.in_features, layer.out_features, bias=False)
        self.weight = layer.weight
        self.tier = bitmask.tier()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.shape[:-1].numel()
        if self.tier is None or tokens not in TOKENS:
            return F.linear(x, self.weight)
        return dense_tokens(x.reshape(tokens, -1), self.weight, self.tier).view(*x.shape[:-1], -1)


@dataclass(frozen=True)
class Size:
    """The shape of a Llama.

    Args:
        hidden (`int`): The width of the model.
        intermediate (`int`): The width inside the feed-forward part.
        layers (`int`): The number of transformer blocks.
        heads (`int`): The number of attention heads.
        kv_heads (`int`): The number of heads of keys and values.
        vocabulary (`int`): The number of tokens there are.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int

    def config(self) -> LlamaConfig:
        """The configuration of the model."""
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=2048,
        )


SIZES = {"1B": Size(2048, 5632, 22, 32, 4, 32000), "8B-layers": Size(4096, 14336, 8, 32, 8, 32000)}
QUICK_SIZES = {"tiny": Size(64, 128, 2, 4, 2, 64)}


@app.command()
def main(
    size: Annotated[list[str], typer.Option(help="1B or 8B-layers. May be repeated.")] = [*SIZES],  # noqa: B006
    rounds: opt.RoundsOption = None,
    seconds: opt.SecondsOption = 60.0,
    warmup: opt.WarmupOption = None,
    threads: opt.ThreadsOption = None,
    seed: opt.SeedOption = 0,
    machine: opt.MachineOption = None,
    output_dir: opt.OutputOption = opt.DEFAULT_OUTPUT,
    plot_only: opt.PlotOnlyOption = None,
    quick: opt.QuickOption = False,
) -> None:
    """Time whole models on compressed weights next to dense ones."""
    if plot_only is not None:
        draw(opt.load_result(plot_only, NAME), plot_only.with_suffix(".png"))
        return
    schedule = opt.make_rounds(opt.Device.cpu, quick, rounds=rounds, seconds=seconds, warmup=warmup, minimum=5)
    run = opt.start_run(NAME, opt.Device.cpu, machine, output_dir, threads, quick)
    chosen = opt.choose("--size", size, SIZES)
    sizes = QUICK_SIZES if quick else {name: one for name, one in SIZES.items() if one in chosen}
    result = run.new_result(
        REFERENCE,
        sizes={name: asdict(one) for name, one in sizes.items()},
        weights="random, pruned by magnitude, row by row",
        prompt=PROMPT,
        new_tokens=NEW_TOKENS,
        seed=seed,
    )
    for name, one in sizes.items():
        models = build_models(one, seed)
        ids = torch.randint(0, one.vocabulary, (1, 16 if quick else max(PROMPTS)))
        tasks: dict[str, Callable[[LlamaForCausalLM], object]] = {"generate": partial(generate, ids=ids[:, :PROMPT])}
        for tokens in [16] if quick else PROMPTS:
            tasks[f"prompt of {tokens}"] = partial(read_prompt, ids=ids[:, :tokens])
        for task, function in tasks.items():
            contestants = [Contestant(key, partial(function, model)) for key, model in models.items()]
            samples = measure_interleaved(contestants, run.device, schedule, seed)
            values = {key: {"linear_bytes": float(linear_bytes(model))} for key, model in models.items()}
            result.cases.append(Case({"model": name, "task": task}, samples, values))
            result.save(run.json_path)
        del models, tasks, contestants
    for precision in ("fp32", "bf16"):
        training = choose_size(opt.Device.cpu, quick, None, None)
        base = build_llama(training.config(), PRECISIONS[precision].dtype, run.device, seed)
        result.settings["training"] = training.describe(base)
        steps = {
            name: TrainingStep(COMPETITORS[competitor], base, training, PRECISIONS[precision], seed)
            for name, competitor in {"dense": "spp", "2:4": "spp_compressed"}.items()
        }
        contestants = [Contestant(name, step, step.drop_gradients) for name, step in steps.items()]
        samples = measure_interleaved(contestants, run.device, schedule, seed)
        values = {name: {"linear_bytes": float(linear_bytes(step.llama))} for name, step in steps.items()}
        result.cases.append(Case({"model": f"98M, {precision}", "task": "training step"}, samples, values))
        result.save(run.json_path)
        del base, steps, contestants
    report(result)
    draw(result, run.picture_path)
    make_console().print(f"Written: {run.json_path}")


def build_models(size: Size, seed: int) -> dict[str, LlamaForCausalLM]:
    """The models by contestant; those that are dense share their weights."""
    torch.manual_seed(seed)
    with default_dtype(torch.bfloat16):
        dense = LlamaForCausalLM(size.config()).eval().requires_grad_(False)
    models = {"dense": dense, "own": with_layers(dense, OwnDenseLinear)}
    for share in (0.5, 0.75):
        for layer in block_linears(dense).values():
            prune_rows(layer.weight, share)
        # one layer at a time: there is never a second dense model
        models[f"{share:.0%}"] = with_layers(dense, compress)
    return models


def with_layers(model: LlamaForCausalLM, make: Callable[[nn.Linear], nn.Module]) -> LlamaForCausalLM:
    """A copy of a model that shares its parameters, with other linear layers inside the blocks."""
    shared = copy.deepcopy(model, memo={id(parameter): parameter for parameter in model.parameters()})
    for name, layer in block_linears(shared).items():
        shared.set_submodule(name, make(layer))
    return shared


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers inside the blocks."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layers." in name
    }


@torch.no_grad()
def prune_rows(weight: torch.Tensor, share: float) -> None:
    """Zero the smallest weights of each row, as Wanda does in each row."""
    smallest = weight.abs().topk(round(weight.shape[1] * share), dim=1, largest=False).indices
    weight.scatter_(1, smallest, 0.0)


@torch.inference_mode()
def generate(model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    """A number of new tokens, greedy."""
    model.generate(ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)  # type: ignore[misc]


@torch.inference_mode()
def read_prompt(model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    """One forward pass, with the logits of the last token."""
    model(input_ids=ids, logits_to_keep=1)


def linear_bytes(model: nn.Module) -> int:
    """The bytes that the weights of the linear layers inside the blocks take in memory."""
    total = 0
    for layer in block_linears(model).values():
        tensors = [layer.weight]
        if isinstance(layer, CompressedLinear):
            tensors += [layer.bitmask, layer.row_offsets]
        total += sum(tensor.nbytes for tensor in tensors)
    return total


def report(result: BenchmarkResult) -> None:
    """Print all cases as one table."""
    headings = ["model", "task", "layers", "ms, median (quartiles)", "× PyTorch's dense (quartiles)", "bytes"]
    rows = []
    for case in result.cases:
        dense_bytes = case.values[REFERENCE]["linear_bytes"]
        for name in case.samples:
            rows.append(
                [
                    case.parameters["model"],
                    case.parameters["task"],
                    LABELS[name],
                    format_seconds(case.summary(name)),
                    format_ratio(case.ratio(name, REFERENCE)),
                    f"{case.values[name]['linear_bytes'] / dense_bytes:.3f}",
                ]
            )
    print_table(make_console(), headings, rows, numbers_from=3)


def draw(result: BenchmarkResult, path: Path) -> None:
    """Draw the ratios to PyTorch's dense layers by task: a panel for each model."""
    tasks = [case for case in result.cases if case.parameters["task"] != "training step"]
    training = [case for case in result.cases if case not in tasks]
    names = list(dict.fromkeys(case.parameters["model"] for case in tasks))
    grouped = {name: [case for case in tasks if case.parameters["model"] == name] for name in names}
    if training:
        grouped["training step, 98M"] = training
    styles = {name: plots.Style(LABELS[name], color, "s") for name, color in COLORS.items()}
    figure, (row,) = plots.panels(
        1,
        len(grouped),
        "Whole models on compressed weights: time relative to PyTorch's dense layers",
        "Lower is faster; medians, lines from quartile to quartile. "
        f"{result.settings['new_tokens']} new tokens after a prompt of {result.settings['prompt']}.\n"
        f"{plots.machine_note(result.environment)}",
        panel_height=3.0,
        share_y=True,
    )
    row[0].set_ylabel("time ÷ dense")
    for axes, (title, cases) in zip(row, grouped.items(), strict=True):
        shown = {name: style for name, style in styles.items() if any(name in case.samples for case in cases)}
        series = {
            name: [case.ratio(name, REFERENCE) if name in case.samples else None for case in cases] for name in shown
        }
        groups = [
            case.parameters["model"].rpartition(", ")[2] if case in training else case.parameters["task"]
            for case in cases
        ]
        plots.grouped_bars(axes, [group.replace(" of ", "\nof ") for group in groups], series, shown)
        plots.reference_line(axes)
        axes.set_title(title)
    plots.add_legend(figure, styles.values(), reference=LABELS[REFERENCE])
    plots.save_figure(figure, path)


if __name__ == "__main__":
    app()
