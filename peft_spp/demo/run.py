# SPDX-License-Identifier: Apache-2.0
"""The demo: train, prune, fine-tune with SPP and LoRA, merge, and check what is on disk."""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from pydoc_data.topics import topics

import torch
from datasets import Dataset  # type: ignore[import-untyped]
from peft import LoraConfig, PeftConfig, PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, set_seed

from peft_spp import SPPConfig
from peft_spp.durable import write_text
from peft_spp.pruning import prune_wanda

from .checks import SavedModelCheck, check_saved_models
from .config import DemoConfig
from .data import join_texts, split_topics, token_blocks, train_tokenizer
from .display import make_progress, quiet_libraries, show_results, show_step
from .output import OutputFolder
from .training import ProgressCallback, fine_tune, train_dense


def run_demo(output: OutputFolder, config: DemoConfig, console: Console) -> dict[str, SavedModelCheck]:
    started = time.perf_counter()
    output.prepare()
    with quiet_libraries(), make_progress(console) as progress:
        set_seed(config.seed)
        with show_step(progress, "Train a small tokenizer"):
            train_texts, held_out_texts = split_topics(topics, config.held_out_fraction, config.seed)
            write_text(output.held_out_text, join_texts(held_out_texts))
            tokenizer = train_tokenizer(train_texts, config.vocab_size)
            dataset = token_blocks(tokenizer, join_texts(train_texts), config.block_size)

        callback = ProgressCallback(progress, "Train a small Llama")
        dense = train_dense(config, tokenizer, dataset, output.dense, callback)
        _save(dense, tokenizer, output.dense)

        with show_step(progress, "Prune it to 2:4 with Wanda"):
            pruned = _load(output.dense)
            prune_wanda(pruned, _calibration_batches(dataset, config), pattern="2:4")
            _save(pruned, tokenizer, output.pruned)

        # Both adapt the same layers: all linear layers of the blocks.
        spp = SPPConfig(task_type="CAUSAL_LM", r=16, spp_alpha=32)
        lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
        runs: list[tuple[str, PeftConfig, float, Path, Path]] = [
            ("SPP", spp, config.spp_learning_rate, output.spp_adapter, output.spp_merged),
            ("LoRA", lora, config.lora_learning_rate, output.lora_adapter, output.lora_merged),
        ]
        for method, peft_config, learning_rate, adapter_dir, merged_dir in runs:
            callback = ProgressCallback(progress, f"Fine-tune it with {method}")
            pruned = _load(output.pruned)
            fine_tune(config, pruned, tokenizer, dataset, peft_config, learning_rate, adapter_dir, callback)
            merged = PeftModel.from_pretrained(_load(output.pruned), str(adapter_dir)).merge_and_unload()
            _save(merged, tokenizer, merged_dir)
        _save(_masked_again(_load(output.lora_merged), _load(output.pruned)), tokenizer, output.lora_masked)

        with show_step(progress, "Check the saved models"):
            checks = check_saved_models(output, config)

    results = {
        "python": sys.version.split()[0],
        "config": asdict(config),
        "models": {name: asdict(check) for name, check in checks.items()},
    }
    write_text(output.results, json.dumps(results, indent=2) + "\n")
    show_results(console, output, checks, seconds=time.perf_counter() - started)
    return checks


def _calibration_batches(dataset: Dataset, config: DemoConfig) -> list[torch.Tensor]:
    size = min(len(dataset), config.calibration_batches * config.batch_size)
    sample = dataset.shuffle(seed=config.seed).select(range(size))
    return [torch.tensor(batch["input_ids"]) for batch in sample.iter(config.batch_size)]


@torch.no_grad()
def _masked_again(merged: PreTrainedModel, pruned: PreTrainedModel) -> PreTrainedModel:
    """The merged model with the zeros of the pruned one: what is left of a LoRA if the model has to stay sparse."""
    places = dict(pruned.named_parameters())
    for name, weight in merged.named_parameters():
        weight[places[name] == 0] = 0
    return merged


def _load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder)


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
