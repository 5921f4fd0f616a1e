# SPDX-License-Identifier: Apache-2.0
"""The methods: how each adapts a pruned model, what it saves, and how that becomes a plain model again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import HiraConfig, IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_spp import SPPConfig
from peft_spp.pruning.layers import apply_mask, find_target_layers, weight_matrix

from ..competitors.block_linears import replace_block_linears
from ..competitors.masked import MaskedFullLinear, MaskedLoRALinear
from ..harness.plots import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY_BLUE, VERMILLION, YELLOW, Style


SPP_RANK = 16
RANKS = {"spp": SPP_RANK, "spp_positive": SPP_RANK, "hira": 32, "lora": 16, "masked_lora": 16}
"""The default rank of each method that has one: HiRA's is that of PEFT."""
SHARE = 0.01
"""The share of the weights that Supertuning trains, PEFT's default."""
SCALING = 2.0
"""alpha / r, for the methods that have an alpha."""

ADAPTER_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class Method(ABC):
    """A way to fine-tune a pruned model.

    Args:
        name (`str`): Its name in results.
        style (`Style`): How it appears in pictures and tables.
        rates (`tuple[float, ...]`): The grid of learning rates, ascending.
        deployments (`tuple[str, ...]`): What becomes of a trained model: `"merged"`, `"unmerged"` (the adapter next to
            the pruned weights) or `"remasked"` (merged, and what had been pruned set to zero again).
        trains_weights (`bool`): Whether it trains the weights themselves. Small steps are lost in bfloat16, so they
            are float32 in training, under autocast.
    """

    name: str
    style: Style
    rates: tuple[float, ...]
    deployments: tuple[str, ...] = ("merged",)
    trains_weights: bool = False

    @abstractmethod
    def adapt(self, model: PreTrainedModel, options: Mapping[str, Any]) -> nn.Module:
        """
        Adapt every linear layer inside the transformer blocks of a pruned model, in place, and freeze the rest.

        Args:
            model (`PreTrainedModel`): The model.
            options (`Mapping[str, Any]`): What differs from the method's defaults.

        Returns:
            `nn.Module`: The model to train.
        """

    @abstractmethod
    def save(self, adapted: nn.Module, folder: Path) -> None:
        """Save what was trained, as [`ADAPTER_FILE`] among others."""

    @abstractmethod
    def load(self, model: PreTrainedModel, folder: Path) -> nn.Module:
        """Load what was trained onto the pruned model, not merged."""

    @abstractmethod
    def merge(self, model: PreTrainedModel, folder: Path) -> PreTrainedModel:
        """Merge what was trained into the pruned model; the result has no adapter."""


@dataclass(frozen=True)
class PeftMethod(Method):
    """A method that PEFT has, SPP among them.

    Args:
        make_config (`Callable[[PreTrainedModel, Mapping[str, Any]], PeftConfig]`): Makes its configuration.
    """

    make_config: Callable[[PreTrainedModel, Mapping[str, Any]], PeftConfig] = lambda model, options: PeftConfig()

    def adapt(self, model: PreTrainedModel, options: Mapping[str, Any]) -> nn.Module:
        config = self.make_config(model, options)
        adapted = get_peft_model(model, config, autocast_adapter_dtype="factors" not in options)
        initialize_spp(adapted, options)
        return adapted

    def save(self, adapted: nn.Module, folder: Path) -> None:
        cast(PeftModel, adapted).save_pretrained(str(folder))

    def load(self, model: PreTrainedModel, folder: Path) -> nn.Module:
        return PeftModel.from_pretrained(model, str(folder))

    def merge(self, model: PreTrainedModel, folder: Path) -> PreTrainedModel:
        return cast(PreTrainedModel, PeftModel.from_pretrained(model, str(folder)).merge_and_unload())


@dataclass(frozen=True)
class MaskedMethod(Method):
    """A method whose layers are in `benchmarks.competitors`: it updates the weight under the mask."""

    def adapt(self, model: PreTrainedModel, options: Mapping[str, Any]) -> nn.Module:
        replace_conv1d(model)
        if self.name == "masked_full":
            return replace_block_linears(model, MaskedFullLinear)
        r = options.get("r", RANKS[self.name])
        return replace_block_linears(model, lambda linear: MaskedLoRALinear(linear, r=r, alpha=SCALING * r))

    def save(self, adapted: nn.Module, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
        save_file(
            {name: parameter.detach().contiguous() for name, parameter in trained.items()}, folder / ADAPTER_FILE
        )

    def load(self, model: PreTrainedModel, folder: Path) -> nn.Module:
        return self.merge(model, folder)

    @torch.no_grad()
    def merge(self, model: PreTrainedModel, folder: Path) -> PreTrainedModel:
        trained = load_file(folder / ADAPTER_FILE, device=str(model.device))
        for name, layer in find_target_layers(model, None).items():
            weight = weight_matrix(layer)
            if self.name == "masked_full":
                weight.copy_(trained[f"{name}.weight"])
            else:
                update = SCALING * trained[f"{name}.B"] @ trained[f"{name}.A"]
                weight.add_((update * (weight != 0)).to(weight.dtype))
        return model


def spp_config(model: PreTrainedModel, options: Mapping[str, Any]) -> SPPConfig:
    """SPP with its defaults, r = 16 and s = 2, but for what the options say."""
    r = options.get("r", SPP_RANK)
    return SPPConfig(
        task_type="CAUSAL_LM",
        r=r,
        spp_alpha=options.get("scaling", SCALING) * r,
        spp_dropout=options.get("dropout", 0.0),
        fan_in_fan_out=has_conv1d(model),
        target_modules=target_names(model),
        init_weights="positive" if options.get("A") == "positive" else True,
    )


def spp_positive_config(model: PreTrainedModel, options: Mapping[str, Any]) -> SPPConfig:
    """The same, with A started from absolute values."""
    return spp_config(model, {**options, "A": "positive"})


def hira_config(model: PreTrainedModel, options: Mapping[str, Any]) -> PeftConfig:
    """PEFT's HiRA, r = 32 by default."""
    return HiraConfig(
        task_type="CAUSAL_LM",
        r=options.get("r", RANKS["hira"]),
        fan_in_fan_out=has_conv1d(model),
        target_modules=target_names(model),
    )


def lora_config(model: PreTrainedModel, options: Mapping[str, Any]) -> LoraConfig:
    """PEFT's LoRA, r = 16 by default, s = 2."""
    r = options.get("r", RANKS["lora"])
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=int(SCALING * r),
        fan_in_fan_out=has_conv1d(model),
        target_modules=target_names(model),
    )


def supertuning_config(model: PreTrainedModel, options: Mapping[str, Any]) -> PeftConfig:
    """PEFT's Supertuning of linear layers: it trains the largest entries, 1 % of the weights by default."""
    # not at the top: PEFT has it since 0.21
    from peft import SupertuningConfig

    return SupertuningConfig(
        task_type="CAUSAL_LM", sparsity=1 - options.get("share", SHARE), target_modules=target_names(model)
    )


def ia3_config(model: PreTrainedModel, options: Mapping[str, Any]) -> IA3Config:
    """PEFT's IA³: a vector on the output of every layer, on the input of the last of the feed-forward part."""
    names = target_names(model)
    return IA3Config(
        task_type="CAUSAL_LM",
        target_modules=names,
        feedforward_modules=[name for name in names if name.endswith(("down_proj", "mlp.c_proj"))],
        fan_in_fan_out=has_conv1d(model),
    )


SPP = PeftMethod("spp", Style("SPP", BLUE, "o"), (6e-3, 2e-2, 6e-2), make_config=spp_config)
SPP_POSITIVE = PeftMethod(
    "spp_positive", Style("SPP, positive start", SKY_BLUE, "h"), SPP.rates, make_config=spp_positive_config
)
HIRA = PeftMethod("hira", Style("HiRA", ORANGE, "^"), (3e-3, 1e-2, 3e-2), make_config=hira_config)
IA3 = PeftMethod("ia3", Style("IA³", YELLOW, "v"), (1e-2, 3e-2, 1e-1), make_config=ia3_config)
LORA = PeftMethod(
    "lora",
    Style("LoRA", BLACK, "s"),
    (1e-3, 3e-3, 1e-2),
    ("unmerged", "merged", "remasked"),
    make_config=lora_config,
)
MASKED_LORA = MaskedMethod("masked_lora", Style("Masked LoRA", GREEN, "D"), (1e-3, 3e-3, 1e-2))
MASKED_FULL = MaskedMethod(
    "masked_full", Style("Masked full fine-tuning", PURPLE, "P"), (3e-4, 1e-3, 3e-3), trains_weights=True
)

SUPERTUNING = PeftMethod(
    "supertuning", Style("Supertuning", VERMILLION, "X"), (3e-4, 1e-3, 3e-3), make_config=supertuning_config
)

METHODS: dict[str, Method] = {
    method.name: method for method in (SPP, SPP_POSITIVE, HIRA, IA3, LORA, MASKED_LORA, MASKED_FULL, SUPERTUNING)
}


def target_names(model: nn.Module) -> list[str]:
    """The full names of the linear layers inside the transformer blocks, which all methods adapt."""
    return list(find_target_layers(model, None))


def has_conv1d(model: nn.Module) -> bool:
    """Whether those are `Conv1D`, which store their weights transposed."""
    return any(isinstance(layer, Conv1D) for layer in find_target_layers(model, None).values())


def replace_conv1d(model: nn.Module) -> None:
    """Put linear layers with the same values in the place of `Conv1D` inside the transformer blocks."""
    for name, layer in find_target_layers(model, None).items():
        if not isinstance(layer, Conv1D):
            continue
        linear = nn.Linear(layer.nx, layer.nf, device=layer.weight.device, dtype=layer.weight.dtype)
        linear.weight = nn.Parameter(layer.weight.detach().T.contiguous(), requires_grad=False)
        linear.bias = layer.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, linear)


def equal_options(model: nn.Module, method: str) -> dict[str, Any]:
    """The rank or share of the weights with which a method trains as many parameters as SPP's default, nearly."""
    shapes = [weight_matrix(layer).shape for layer in find_target_layers(model, None).values()]
    spp = sum(min(SPP_RANK, m) * n + m for m, n in shapes)
    if method == "supertuning":
        return {"share": round(spp / sum(m * n for m, n in shapes), 5)}
    return {"r": max(1, round(spp / sum(m + n for m, n in shapes)))}


@torch.no_grad()
def remask(model: nn.Module, pruned: nn.Module) -> None:
    """Set to zero again in `model` what is zero in the linear layers of `pruned`."""
    layers = find_target_layers(model, None)
    for name, layer in find_target_layers(pruned, None).items():
        apply_mask(layers[name], weight_matrix(layer) != 0)


@torch.no_grad()
def initialize_spp(adapted: nn.Module, options: Mapping[str, Any]) -> None:
    """
    Draw SPP's factors otherwise than it does.

    Args:
        adapted (`nn.Module`): The adapted model.
        options (`Mapping[str, Any]`): `"A"` may be `"ones"`; `"B"` may be `"random"`, which is not the identity at
            the start.
    """
    for name, parameter in adapted.named_parameters():
        if ".spp_A." in name and options.get("A") == "ones":
            parameter.fill_(1.0)
        elif ".spp_B." in name and options.get("B") == "random":
            parameter.uniform_(-1.0, 1.0)


def trainable_parameters(model: nn.Module) -> int:
    """How many parameters are trained: of a masked weight only those that are not masked."""
    masked = {
        id(module.weight): int(module.mask.sum()) for module in model.modules() if isinstance(module, MaskedFullLinear)
    }
    return sum(masked.get(id(p), p.numel()) for p in model.parameters() if p.requires_grad)
