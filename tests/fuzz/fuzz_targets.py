# SPDX-License-Identifier: Apache-2.0
"""What is fuzzed: functions that take any bytes, and fail unless the loaders take them or refuse them as they should.

A loader refuses with a `ValueError` or an `OSError` of ours, which names the file. Anything else is a bug: a
`JSONDecodeError`, a `KeyError` from within, an error without a name.
"""

from __future__ import annotations

import atexit
import json
import shutil
import struct
import tempfile
import warnings
from collections.abc import Callable
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save, save_file
from torch import nn

from peft_spp import SPPConfig
from peft_spp.checkpoints.checkpoint import read_checkpoint
from peft_spp.checkpoints.safetensors_files import read_header
from peft_spp.checkpoints.tensor_file import open_tensor_file
from peft_spp.merge.adapter import load_adapter
from peft_spp.sparsity.base_masks import BASE_MASKS, read_base_masks
from peft_spp.sparsity.mask_record import MaskRecord
from peft_spp.tuner.adapter_files import list_tensors
from peft_spp.tuner.saved_adapter import SavedAdapter, check_adapter, read_adapter, read_settings


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
INDEX = "model.safetensors.index.json"
SEPARATOR = b"\n\x00\n"
"""Between the two files of the target `adapter`."""


@cache
def work() -> Path:
    """A folder for the files, in memory where there is such a place."""
    in_memory = Path("/dev/shm")
    folder = tempfile.mkdtemp(dir=in_memory if in_memory.is_dir() else None)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    warnings.simplefilter("ignore")
    return Path(folder)


@contextmanager
def refused_by_name(*names: str):
    """Take an error of ours that names one of these."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        ours = type(error) in (ValueError, FileNotFoundError)
        if not ours or not any(name in str(error) for name in names):
            raise


def config(data: bytes) -> None:
    file = work() / "config" / CONFIG
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(data)
    with refused_by_name(str(file)):
        read_settings(file.parent)
    with refused_by_name(str(file)):
        settings = SPPConfig.from_json_file(str(file))
        if settings.get("peft_type", "SPP") == "SPP":
            with suppress(TypeError):  # PEFT's, of a file without `peft_type`
                SPPConfig.from_peft_type(**{key: value for key, value in settings.items() if value is not None})


def header(data: bytes) -> None:
    file = work() / "header" / WEIGHTS
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(data)
    with refused_by_name(str(file)):
        for one in read_header(file):
            one.load()
    with refused_by_name(str(file)):
        for tensor in open_tensor_file(file).tensors.values():
            if isinstance(tensor.dtype, torch.dtype):
                tensor.load()
    with refused_by_name(str(file)):
        check_adapter(SavedAdapter(str(file), file.parent, SPPConfig(r=2), list_tensors(file, pickled=False)[0]))


def index(data: bytes) -> None:
    folder = work() / "index"
    if not folder.exists():
        folder.mkdir()
        for shard, names in (("a.safetensors", ("x", "y")), ("b.safetensors", ("z",))):
            save_file({name: torch.ones(2) for name in names}, folder / shard)
    (folder / INDEX).write_bytes(data)
    with refused_by_name(str(folder)):
        checkpoint = read_checkpoint(folder)
        assert all(file.path.resolve().parent == folder.resolve() for file in checkpoint.files)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)


@cache
def base() -> Base:
    return Base()


def adapter(data: bytes) -> None:
    """Settings and weights in one folder, loaded onto a model, which must be as it was if they are refused."""
    folder = work() / "adapter"
    folder.mkdir(exist_ok=True)
    settings, _, weights = data.partition(SEPARATOR)
    (folder / CONFIG).write_bytes(settings)
    (folder / WEIGHTS).write_bytes(weights)
    with refused_by_name(str(folder)):
        load_adapter(folder)
    loaded = None
    with refused_by_name(str(folder)):
        loaded = read_adapter(folder).config
    if loaded is None or loaded.task_type is not None:
        return
    if loaded.modules_to_save or loaded.trainable_token_indices:
        return  # which PEFT looks up in the weights and in the model by itself
    model = base()
    modules = {name: id(module) for name, module in model.named_modules()}
    try:
        PeftModel.from_pretrained(model, folder).unload()
    except (ValueError, RuntimeError) as error:
        assert type(error).__name__ in ("ValueError", "RuntimeError", "NoMatchingPeftModuleError"), error
    assert {name: id(module) for name, module in model.named_modules()} == modules


def mask_record(data: bytes) -> None:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return
    file = work() / BASE_MASKS
    file.write_bytes(data)
    with refused_by_name(str(file)):
        read_base_masks(file)
    with refused_by_name("mask record"):
        record = MaskRecord.from_dict(content if isinstance(content, dict) else {})
        assert MaskRecord.from_dict(json.loads(json.dumps(record.to_dict()))) == record
        assert record.relation_of(record) == "same"
        assert record.relation_of(MaskRecord((2, 8), 8, "2:4", "0", "AAA=")) in ("same", "refined", "different")
        assert 0 <= record.sparsity <= 1


TARGETS: dict[str, Callable[[bytes], None]] = {
    "config": config,
    "header": header,
    "index": index,
    "adapter": adapter,
    "mask_record": mask_record,
}
"""The targets by name."""


def seeds() -> dict[str, list[bytes]]:
    """Valid inputs to start from, for each target."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"r": 2, "target_modules": ["first", "second"], "rank_pattern": {"second": 1}}
        model = get_peft_model(Base(), SPPConfig(**settings))
        record = model.peft_config["default"].base_record.to_dict()
        model.save_pretrained(folder)
        saved, weights = Path(folder, CONFIG).read_bytes(), Path(folder, WEIGHTS).read_bytes()
    compact = json.dumps(json.loads(saved)).encode()
    some_types = {
        "a.spp_A.weight": torch.ones(2, 3, dtype=torch.bfloat16),
        "a.spp_B.weight": torch.ones(4, 1, dtype=torch.float16),
        "b": torch.ones(2, dtype=torch.int8),
        "c": torch.ones(3, dtype=torch.float8_e4m3fn),
        "d": torch.zeros(0, 2, dtype=torch.complex64),
        "e": torch.tensor(1.0),
    }
    listing = {"metadata": {"total_size": 24}, "weight_map": {"x": "a.safetensors", "y": "a.safetensors"}}
    everything = {"layers_to_transform": [0], "layers_pattern": "layers", "trainable_token_indices": {"emb": [1]}}
    everything |= {"alpha_pattern": {"^a.b$": 1.5}, "exclude_modules": ".*c", "modules_to_save": ["d"], "bias": "all"}
    return {
        "config": [compact, json.dumps(json.loads(saved) | everything).encode(), b'{"peft_type": "SPP"}'],
        "header": [weights, save(some_types), struct.pack("<Q", 2) + b"{}"],
        "index": [json.dumps(listing).encode(), b'{"weight_map": {"x": "../a.safetensors", "y": "/b.safetensors"}}'],
        "adapter": [compact + SEPARATOR + weights],
        "mask_record": [json.dumps(record).encode(), json.dumps(record["masks"]["first"]).encode()],
    }
