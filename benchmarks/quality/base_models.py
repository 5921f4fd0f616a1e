# SPDX-License-Identifier: Apache-2.0
"""The dense models, trained from scratch, and their pruned copies: made once and kept in a folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from huggingface_hub import snapshot_download
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from peft_spp.demo.data import train_tokenizer
from peft_spp.pruning.by_block import prune_model
from peft_spp.pruning.registry import METHODS

from .data import Texts, blocks_of
from .design import Checkpoint, Pruning, TrainedModel, TuningBudget
from .samples import sampled_blocks
from .tuning import TuningSettings, as_tensor, train


WEIGHT_DECAY = 0.1
SLOW = ("DEFAULT", "AVX2")
"""What PyTorch calls processors whose products of 16-bit numbers are those of a loop."""


class BaseModel:
    """
    A model of a suite in its folder, dense and pruned.

    Args:
        spec (`TrainedModel` or `Checkpoint`): What it is.
        texts (`Texts`): What it is trained on.
        budget (`TuningBudget`): How much of the texts to measure on and to prune with.
        folder (`Path`): Where models are kept, each in a folder of its own.
        accelerator (`Accelerator`): The device.
    """

    def __init__(
        self,
        spec: TrainedModel | Checkpoint,
        texts: Texts,
        budget: TuningBudget,
        folder: Path,
        accelerator: Accelerator,
    ) -> None:
        self.spec, self.texts, self.budget, self.accelerator = spec, texts, budget, accelerator
        # not the folder of a checkpoint, which another machine may have elsewhere
        described = asdict(spec) | ({"source": Path(spec.source).name} if isinstance(spec, Checkpoint) else {})
        self.fingerprint = fingerprint(described, texts.fingerprint, budget.calibration_blocks)
        self.folder = folder / f"{spec.name.replace(':', '-')}-{self.fingerprint}"
        self._weights_ids: dict[str, str | None] = {}

    def load(self, pruning: Pruning | None, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """
        Load the model again, from the disk onto the device.

        Args:
            pruning (`Pruning`, *optional*): How it is pruned; `None` for the dense one.
            dtype (`torch.dtype`, *optional*): The dtype, by default that of the files.
        """
        return load_plain(self.source(pruning), self.accelerator.device, self.load_dtype(dtype))

    def load_dtype(self, dtype: torch.dtype | None = None) -> torch.dtype:
        """The dtype asked for, by default that of the model."""
        if dtype is not None:
            return dtype
        if not isinstance(self.spec, Checkpoint):
            return torch.float32
        wanted = cast(torch.dtype, getattr(torch, self.spec.compute or self.spec.dtype))
        return wanted if multiplies(wanted, self.accelerator.device) else torch.float32

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """Save a model and the tokenizer, a checkpoint's in its own dtype; the model is converted in place."""
        if isinstance(self.spec, Checkpoint):
            model = model.to(getattr(torch, self.spec.dtype))
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def source(self, pruning: Pruning | None) -> str:
        """The folder of the model, which is made or downloaded before where it has to be."""
        if isinstance(self.spec, Checkpoint) and (pruning is None or pruning.method == "published"):
            return self._checkpoint
        return str(self._dense if pruning is None else self._pruned(pruning))

    def weights_id(self, pruning: Pruning | None) -> str | None:
        """Tells the weights from those that another machine pruned; `None` if they are not in a folder."""
        source = self.source(pruning)
        if source not in self._weights_ids:
            digest, files = hashlib.sha256(), sorted(Path(source).glob("*.safetensors"))
            for file in files:
                with file.open("rb") as stream:
                    hashlib.file_digest(stream, lambda: digest)
            self._weights_ids[source] = digest.hexdigest()[:12] if files else None
        return self._weights_ids[source]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""
        if isinstance(self.spec, Checkpoint):
            return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(self._checkpoint))
        folder = self.folder / "tokenizer"
        if not folder.is_dir():
            with new_folder(folder) as new:
                train_tokenizer(self.texts.train, self.spec.vocabulary).save_pretrained(new)
        return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(folder))

    @cached_property
    def train_blocks(self) -> torch.Tensor:
        """The text to train on."""
        return as_tensor(blocks_of(self.tokenizer, self.texts.train, self.spec.sequence, seed=0))

    @cached_property
    def question_blocks(self) -> torch.Tensor:
        """The training parts of the tasks."""
        return as_tensor(blocks_of(self.tokenizer, self.texts.questions, self.spec.sequence, seed=0))

    @cached_property
    def sampled_blocks(self) -> torch.Tensor:
        """Text that the dense model wrote."""
        path = self.folder / "samples.json"
        return sampled_blocks(
            lambda: self.load(None), self.tokenizer, self.budget.sampled_blocks, self.spec.sequence, path
        )

    def tuning_blocks(self, text: str) -> torch.Tensor:
        """
        Text to tune on.

        Args:
            text (`str`): `"data"`, `"samples"` (which the dense model wrote), `"both"`, half of each, or
                `"questions"`, half of it the training parts of the tasks.
        """
        if text == "data":
            return self.train_blocks
        if text == "samples":
            return self.sampled_blocks
        others = self.sampled_blocks if text == "both" else self.question_blocks
        count = min(len(self.train_blocks), len(others))
        return torch.cat([self.train_blocks[:count], others[:count]])

    @cached_property
    def apart_blocks(self) -> dict[str, torch.Tensor]:
        """The texts to measure on one by one; none if the budget has none."""
        count = self.budget.apart_blocks
        return {name: self._some(texts, count) for name, texts in self.texts.apart.items()} if count else {}

    @cached_property
    def validation_blocks(self) -> torch.Tensor:
        """The text to choose learning rates by."""
        return self._some(self.texts.validation, self.budget.validation_blocks)

    @cached_property
    def test_blocks(self) -> torch.Tensor:
        """The text to measure on."""
        return self._some(self.texts.test, self.budget.test_blocks)

    @property
    def is_made(self) -> bool:
        """Whether it needs no training: it has been trained, or is a checkpoint."""
        return isinstance(self.spec, Checkpoint) or self._dense.is_dir()

    @property
    def training_steps(self) -> int:
        """The steps of the training from scratch."""
        return 0 if isinstance(self.spec, Checkpoint) else self.spec.steps

    def make(self, on_step: Callable[[int, float], object]) -> None:
        """
        Train the model, if it has not been.

        Args:
            on_step (`Callable[[int, float], object]`): Called with the number of steps done and the loss.
        """
        if isinstance(self.spec, Checkpoint) or self.is_made:
            return
        set_seed(self.spec.seed)
        model = new_model(self.spec, self.tokenizer).to(self.accelerator.device)
        settings = TuningSettings(
            self.spec.rate,
            self.spec.steps,
            self.spec.batch,
            self.spec.seed,
            weight_decay=WEIGHT_DECAY,
            muon_rate=self.spec.muon_rate,
            autocast=True,
        )
        record = train(model, self.train_blocks, settings, self.accelerator, on_step)
        if record.diverged:
            raise RuntimeError(f"The training of {self.spec.name} diverged: lower its rate in benchmarks/quality.")
        if self.accelerator.is_main_process:
            with new_folder(self._dense) as new:
                model.save_pretrained(new)
                self.tokenizer.save_pretrained(new)
                seconds = {"seconds": record.seconds, "cpu_seconds": record.cpu_seconds, "tokens": record.tokens}
                (new / "training.json").write_text(json.dumps(seconds))
        self.accelerator.wait_for_everyone()

    def training(self) -> dict[str, Any]:
        """Seconds and tokens of the training from scratch, as when it was done; empty for a checkpoint."""
        if isinstance(self.spec, Checkpoint):
            return {}
        return cast(dict[str, Any], json.loads((self._dense / "training.json").read_text()))

    @cached_property
    def _checkpoint(self) -> str:
        assert isinstance(self.spec, Checkpoint)
        if Path(self.spec.source).is_dir():
            return self.spec.source
        return snapshot_download(self.spec.source, allow_patterns=["*.safetensors", "*.json", "tokenizer*"])

    @property
    def _dense(self) -> Path:
        return self.folder / "dense"

    def _pruned(self, pruning: Pruning) -> Path:
        folder = self.folder / pruning.name.replace(":", "-")
        if not folder.is_dir() and self.accelerator.is_main_process:
            model = self.load(None)
            prune(model, pruning, self.train_blocks[: self.budget.calibration_blocks].to(self.accelerator.device))
            with new_folder(folder) as new:
                self.save(model, new)
        self.accelerator.wait_for_everyone()
        return folder

    def _some(self, texts: tuple[str, ...], count: int) -> torch.Tensor:
        blocks = blocks_of(self.tokenizer, texts, self.spec.sequence, seed=0)
        if not blocks:
            raise ValueError(f"The held-out texts do not fill a block of {self.spec.sequence} tokens: give more text.")
        return as_tensor(blocks[:count])


def multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a device multiplies a dtype at speed: bfloat16 on a processor with AVX2 only takes 150 times as long."""
    return dtype == torch.float32 or device.type != "cpu" or torch.backends.cpu.get_cpu_capability() not in SLOW


def load_plain(source: str | Path, device: torch.device, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal language model from disk or from the Hub, as plain Transformers loads it."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    return model.to(device)  # type: ignore[arg-type]  # Transformers' annotation leaves devices out


def new_model(spec: TrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model with random weights."""
    common = {
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
    }
    if spec.architecture == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                n_embd=spec.hidden,
                n_inner=spec.intermediate,
                n_layer=spec.layers,
                n_head=spec.heads,
                n_positions=spec.sequence,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                **common,
            )
        )
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=spec.hidden,
            intermediate_size=spec.intermediate,
            num_hidden_layers=spec.layers,
            num_attention_heads=spec.heads,
            num_key_value_heads=spec.heads,
            max_position_embeddings=spec.sequence,
            **common,
        )
    )


def prune(model: PreTrainedModel, pruning: Pruning, blocks: torch.Tensor) -> None:
    """Prune a model in place, calibrated with blocks of tokens where the method wants that."""
    request: dict[str, Any] = {"pattern": pruning.pattern}
    if pruning.pattern is None:
        request = {"sparsity": pruning.sparsity}
    if pruning.method not in METHODS:
        raise ValueError(f"A model that is trained here cannot be pruned by {pruning.method!r}.")
    prune_model(model, METHODS[pruning.method](**request), blocks.split(16))


def fingerprint(*parts: Any) -> str:
    """A short name for settings: equal for equal settings."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder that is either complete or not there: it is filled under another name and then renamed."""
    unfinished = folder.with_name(f".{folder.name}-{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
