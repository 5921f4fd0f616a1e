# SPDX-License-Identifier: Apache-2.0
"""What `accelerate launch` starts in the tests: a few steps of Transformers' Trainer, and what is left of them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from distributed_task import ADAM, GLOBAL_BATCH, STEPS, adapter_config, factors, token_ids
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from peft_spp.checkpoints.names import unwrapped_name
from peft_spp.compressed import CompressedLinear, compress
from peft_spp.compressed.experts import CompressedExperts
from peft_spp.tuner.engines import is_sharded, is_zero3, whole_parameters


IS_DEEPSPEED = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
IS_FSDP = os.environ.get("ACCELERATE_USE_FSDP") == "true"


def use_cpu() -> None:
    """Let accelerate use CPUs and gloo for what its configuration asks for."""
    if IS_DEEPSPEED:
        from deepspeed.ops import __compatible_ops__

        # compiling its collectives for shared memory takes minutes, and gloo has them too
        __compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed is on the CPU because `DS_ACCELERATOR` says so
    PartialState(cpu=not IS_DEEPSPEED, backend="gloo")
    if IS_FSDP:
        # accelerate looks at the configuration of FSDP only if its processes are not of the CPU's kind
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def arguments(output: Path, **settings: Any) -> TrainingArguments:
    defaults = {
        "output_dir": str(output / "trainer"),
        "per_device_train_batch_size": GLOBAL_BATCH // int(os.environ["WORLD_SIZE"]),
        "max_steps": STEPS,
        "learning_rate": ADAM["lr"],
        "weight_decay": ADAM["weight_decay"],
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not IS_DEEPSPEED,
        "accelerator_config": {"use_configured_state": True},
    }
    args = TrainingArguments(**{**defaults, **settings})
    if IS_DEEPSPEED:
        # partition also what is small
        args.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return args


def save_adapter(trainer: Trainer, folder: Path) -> None:
    model = trainer.model_wrapped
    if not isinstance(model, FullyShardedDataParallel):
        trainer.save_model(str(folder))
        return
    # the trainer has the state dict offloaded to the host, which FSDP1 cannot do if the host is the device as well
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT, FullStateDictConfig()):
        state_dict = model.state_dict()
    if trainer.is_world_process_zero():
        trainer.model.save_pretrained(folder, state_dict=state_dict)


def merge(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The weights after merging the adapter where the model is trained."""
    model: PeftModel = trainer.model
    is_fsdp1 = isinstance(trainer.model_wrapped, FullyShardedDataParallel)
    synced = weights_for_an_inference_engine(model) if any(map(is_zero3, model.parameters())) else {}
    if is_fsdp1 or any(is_sharded(parameter) for parameter in model.parameters()):
        try:
            model.merge_adapter()
        except RuntimeError as error:
            assert "_proj" in str(error) and ("summon_full_params" if is_fsdp1 else "merge_and_unload") in str(error)
        else:
            raise AssertionError("a sharded weight was merged, with an unmerge to come")
    if is_fsdp1:
        with FullyShardedDataParallel.summon_full_params(trainer.model_wrapped):
            return weights(model.merge_and_unload(safe_merge=True))
    merged = weights(model.merge_and_unload(safe_merge=True))
    assert all(torch.equal(merged[name], weight) for name, weight in synced.items() if name in merged)
    return merged


def weights_for_an_inference_engine(model: PeftModel) -> dict[str, torch.Tensor]:
    """As TRL's trainers send them to vLLM: merged while everything is gathered, and unmerged again."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        model.merge_adapter()
        found = {
            name.removeprefix("base_model.model.").replace(".base_layer", ""): parameter.detach().clone()
            for name, parameter in model.named_parameters()
            if model.prefix not in name
        }
        model.unmerge_adapter()
    assert any("_proj.weight" in name for name in found)
    return found


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for name, module in model.named_modules():
        if ".layers." in name and not any(module.children()):
            with whole_parameters(module):
                if isinstance(module, CompressedLinear):
                    found[f"{unwrapped_name(name)}.weight"] = module.dequantize()
                    continue
                if isinstance(module, CompressedExperts):
                    for stack in module.stacks:
                        found[f"{unwrapped_name(name)}.{stack}"] = module.dequantize(stack)
                for parameter_name, parameter in module.named_parameters():
                    if parameter.ndim > 1:
                        key = f"{unwrapped_name(name)}.{parameter_name}"
                        found[key] = parameter.detach().cpu().clone()
    return found


def main(base: str, output: Path, adapter: dict[str, Any], settings: dict[str, Any]) -> None:
    use_cpu()
    # the arguments come first: they say how the model is to be partitioned while it is loaded
    compressed = settings.pop("compressed", False)
    args = arguments(output, **settings)
    base_model = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(compress(base_model) if compressed else base_model, adapter_config(**adapter))
    model.load_state_dict(factors(model), strict=False)
    data = [{"input_ids": row, "labels": row} for row in token_ids(GLOBAL_BATCH)]
    trainer = Trainer(model, args, train_dataset=data)
    trainer.train()
    save_adapter(trainer, output / "adapter")
    with torch.no_grad():
        logits = trainer.model_wrapped(input_ids=token_ids(2)).logits
    merged = merge(trainer)
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        (output / "losses.json").write_text(json.dumps(losses))
        torch.save(logits, output / "logits.pt")
        save_file(merged, output / "merged.safetensors")
    # a thread of gloo that is left at the end of a process aborts it now and then
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]), json.loads(sys.argv[4]))
