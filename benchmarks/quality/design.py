# SPDX-License-Identifier: Apache-2.0
"""What a suite is made of: models, prunings, contenders, studies and what each contender gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from peft_spp.sparsity import NMPattern


@dataclass(frozen=True)
class TrainedModel:
    """A model that the benchmark trains from scratch.

    Args:
        name (`str`): Its name in results.
        architecture (`str`): `"llama"` or `"gpt2"`, which has `Conv1D` in place of linear layers.
        hidden (`int`): The width of the model.
        intermediate (`int`): The width inside the feed-forward part.
        layers (`int`): The number of transformer blocks.
        heads (`int`): The number of attention heads.
        vocabulary (`int`): The size of the tokenizer's vocabulary, which is trained on the same text.
        sequence (`int`): The tokens in a sequence, in training and evaluation.
        batch (`int`): The sequences in a batch of the training from scratch.
        steps (`int`): Its optimizer steps.
        rate (`float`): Its learning rate with AdamW: of the embeddings, the norms and the head.
        muon_rate (`float`): Its learning rate with Muon: of the matrices inside the blocks. Muon moves all directions
            of a matrix alike, so that fewer weights are redundant: after the same 1800 steps of the Llama of the small
            suite the perplexity is 36.1 and Wanda's 2:4 costs 14 % of it; with AdamW at 2e-3 it was 55.9 and 3 %, too
            little to tell methods apart.
        seed (`int`): The seed of the split of the texts, of the weights and of the order of the data.
    """

    name: str
    architecture: Literal["llama", "gpt2"]
    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    sequence: int
    batch: int
    steps: int
    rate: float
    muon_rate: float = 0.02
    seed: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that exists, on the Hub or in a folder: pruned already, or dense.

    Args:
        name (`str`): Its name in results.
        source (`str`): The Hub's repository or the folder.
        dtype (`str`): The dtype of the files that are made of it.
        sequence (`int`): The tokens in a sequence, in training and evaluation.
        compute (`str`, *optional*): The dtype to load it in, by default that of the files.
    """

    name: str
    source: str
    dtype: str = "bfloat16"
    sequence: int = 512
    compute: str | None = None


@dataclass(frozen=True)
class Pruning:
    """How a model is pruned.

    Args:
        method (`str`): `"magnitude"`, `"wanda"`, `"sparsegpt"`, or `"published"` for a checkpoint as it is.
        request (`str` or `float`): An N:M pattern, or the share of the weights to prune. Of a published checkpoint
            the pattern or share that it is said to have, which is what is checked after merging.
    """

    method: Literal["magnitude", "wanda", "sparsegpt", "published"]
    request: str | float

    @property
    def name(self) -> str:
        """Its name in results, such as `wanda-2:4`."""
        return f"{self.method}-{self.request}"

    @classmethod
    def of(cls, name: str) -> Pruning:
        """The pruning of such a name."""
        method, _, request = name.partition("-")
        return cls(method, request if ":" in request else float(request))  # type: ignore[arg-type]

    @property
    def pattern(self) -> str | None:
        """The N:M pattern; `None` if it is unstructured."""
        return self.request if isinstance(self.request, str) else None

    @property
    def sparsity(self) -> float:
        """The share of the weights that it prunes."""
        return 1 - NMPattern.parse(self.request).density if isinstance(self.request, str) else self.request

    @property
    def request_label(self) -> str:
        """What is asked for, for readers."""
        return self.request if isinstance(self.request, str) else f"{self.request:.0%}"

    @property
    def label(self) -> str:
        """Its name for readers, such as `Wanda 2:4`."""
        methods = {"magnitude": "Magnitude", "wanda": "Wanda", "sparsegpt": "SparseGPT", "published": "Published"}
        return f"{methods[self.method]} {self.request_label}"


@dataclass(frozen=True)
class Contender:
    """A method with its settings.

    Args:
        method (`str`): One of those in `methods.METHODS`.
        options (`Mapping[str, Any]`): What differs from the method's defaults.
        equal (`str`, *optional*):
            `"parameters"` chooses the rank, of Supertuning the share of the weights, so that it trains as many
            parameters as SPP with its defaults, as near as it goes; `"time"` chooses the steps so that it takes SPP's
            time, at the learning rate that was chosen for the method without this.
        rates (`tuple[float, ...]`): The grid of learning rates; empty for that of the method.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    equal: Literal["parameters", "time"] | None = None
    rates: tuple[float, ...] = ()


@dataclass(frozen=True)
class Study:
    """Contenders on one pruned model.

    Args:
        model (`str`): The name of the model.
        pruning (`Pruning`): How it is pruned.
        contenders (`tuple[Contender, ...]`): What is compared.
        seeds (`tuple[int, ...]`): Of the factors and the order of the data. The first chooses the learning rate.
        rates_from (`Pruning`, *optional*):
            Take the learning rates that were chosen for this pruning of the same model, instead of its own grid.
        steps_only (`bool`): Whether only the costs of the contenders' training steps are measured.
    """

    model: str
    pruning: Pruning
    contenders: tuple[Contender, ...]
    seeds: tuple[int, ...] = (0,)
    rates_from: Pruning | None = None
    steps_only: bool = False


@dataclass(frozen=True)
class TuningBudget:
    """The fine-tuning that every contender gets.

    Args:
        steps (`int`): Optimizer steps.
        batch (`int`): Sequences in a batch.
        validation_blocks (`int`): Sequences of text to choose learning rates by.
        test_blocks (`int`): Sequences of text to measure perplexity on.
        calibration_blocks (`int`): Sequences of training text to prune with.
        timing_rounds (`int`): Rounds of the side-by-side timing of the steps.
        exact_match_problems (`int`): GSM8K problems to answer; 0 where the model is too weak to have any right.
        tasks (`tuple[str, ...]`): Tasks of lm-evaluation-harness.
        task_folder (`str`, *optional*): A folder with tasks that the harness does not have.
        micro_batch (`int`, *optional*): The most sequences in one forward pass of a process, by default its whole part
            of the batch. Gradients are summed up to the batch.
        rate_steps (`int`, *optional*): Steps of the runs that choose a learning rate, where these are shorter: of one
            sequence each, and at the rates of the grid only.
        task_limit (`int`, *optional*): Only the first questions of each task.
        apart_blocks (`int`): Sequences of each of the texts that perplexity is measured on one by one.
        sampled_blocks (`int`): Sequences that the dense model writes, for contenders that are tuned on those.
    """

    steps: int
    batch: int
    validation_blocks: int
    test_blocks: int
    calibration_blocks: int
    timing_rounds: int
    exact_match_problems: int = 0
    tasks: tuple[str, ...] = ()
    task_folder: str | None = None
    micro_batch: int | None = None
    rate_steps: int | None = None
    task_limit: int | None = None
    apart_blocks: int = 0
    sampled_blocks: int = 0


@dataclass(frozen=True)
class Suite:
    """All that one run measures.

    Args:
        name (`str`): Its name on the command line.
        models (`tuple[TrainedModel | Checkpoint, ...]`): The models.
        studies (`tuple[Study, ...]`): In the order they are run; rates are taken from studies before.
        budget (`TuningBudget`): What each contender gets.
        reference (`Contender`, *optional*): What the others are compared with. Machines round differently, and each
            prunes its own copy of a model; with a reference, that is tuned on every copy that anything is tuned on.
    """

    name: str
    models: tuple[TrainedModel | Checkpoint, ...]
    studies: tuple[Study, ...]
    budget: TuningBudget
    reference: Contender | None = None

    def model(self, name: str) -> TrainedModel | Checkpoint:
        """The model of that name."""
        return next(model for model in self.models if model.name == name)
