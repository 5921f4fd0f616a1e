# SPDX-License-Identifier: Apache-2.0
"""What is fuzzed: functions that take any bytes, and fail unless the loaders take them or refuse them as they should.

A loader refuses with a `ValueError` or an `OSError` of ours, which names the file or the tensor. Anything else is a
bug: a `JSONDecodeError`, a `KeyError` from within, an error without a name. Compressed weights that are taken must be
what a plain reading of their bits is.
"""

from __future__ import annotations

import atexit
import json
import math
import shutil
import struct
import tempfile
import warnings
from collections.abc import Callable
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save, save_file
from torch import nn

from peft_spp import SPPConfig
from peft_spp.checkpoints.checkpoint import read_checkpoint
from peft_spp.checkpoints.compressed_files import COLUMNS, columns_text, with_dense_weights
from peft_spp.checkpoints.compressed_tensor import find_compressed
from peft_spp.checkpoints.old_compressed_files import with_old_weights
from peft_spp.checkpoints.safetensors_files import read_header
from peft_spp.checkpoints.stored import Stored
from peft_spp.checkpoints.tensor_file import StoredTensor, open_tensor_file
from peft_spp.compressed import CompressedLinear
from peft_spp.functional import bitmask
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


def compressed(data: bytes) -> None:
    """Weights without their zeros in one file, as the commands list them, and as a model takes them."""
    file = work() / "compressed" / "model.safetensors"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(data)
    with refused_by_name(str(file)):
        tensors = open_tensor_file(file).tensors
        _check_dense_weights(file, tensors, is_old=False)
        _check_layers(file, tensors)


def old_compressed(data: bytes) -> None:
    """The same, in the formats that compressed-tensors had."""
    file = work() / "old_compressed" / "model.safetensors"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(data)
    with refused_by_name(str(file)):
        _check_dense_weights(file, open_tensor_file(file).tensors, is_old=True)


def _check_dense_weights(file: Path, tensors: dict[str, StoredTensor], is_old: bool) -> None:
    names = [one for name in tensors for one in (name, f"{name.rpartition('.')[0]}.weight") if one]
    found, listed, dense = {}, [], {}
    with refused_by_name(str(file), *names):
        found = find_compressed(tensors, [file], is_old=is_old)
    accepted = set()
    for name, one in found.items():
        with refused_by_name(str(file), name, one.values.name, one.bitmask.name):
            dense[name] = one.load()
            accepted.add(name)
            shape = dense[name].shape
            places = _places(_bytes_of(file, one.bitmask), shape[-1])
            values = one.values.load().flatten()
            assert shape == one.shape and dense[name].dtype == values.dtype
            assert places is not None and places.sum() == len(values), "a bitmask that does not fit was taken"
            expected = values.new_zeros(shape)
            expected[torch.from_numpy(places.reshape(shape))] = values
            assert _bits(dense[name]) == _bits(expected), "a weight was read wrong"
    with refused_by_name(str(file), *names):
        headers = {file: [_stored(one) for one in tensors.values()]}
        listed = (with_old_weights if is_old else with_dense_weights)(headers)
    for one in listed:
        if one.key in found:
            with refused_by_name(str(file), one.key, found[one.key].values.name, found[one.key].bitmask.name):
                assert one.shape == found[one.key].shape
                loaded = one.load()
                assert one.key in accepted and _bits(loaded) == _bits(dense[one.key])


def _check_layers(file: Path, tensors: dict[str, StoredTensor]) -> None:
    """A model's layer has a shape, whatever the file says of it."""
    for name, layer in layers().items():
        values, bits = (tensors.get(f"{name}.{part}") for part in ("weight", "bitmask"))
        if values is None or bits is None or not isinstance(values.dtype, torch.dtype) or bits.dtype != "U8":
            continue
        state = {"weight": values.load(), "bitmask": torch.from_numpy(_bytes_of(file, bits).copy())}
        with refused_by_name("weight"):
            layer.load_state_dict(state)
            places = _places(_bytes_of(file, bits), layer.in_features)
            assert places is not None and places.shape == (layer.out_features, layer.in_features)
            assert places.sum() == len(state["weight"]), "a bitmask that does not fit was taken"
            expected = torch.zeros(places.shape)
            expected[torch.from_numpy(places)] = state["weight"].float()
            assert torch.equal(layer.dequantize().nan_to_num(), expected.nan_to_num())


@cache
def layers() -> dict[str, CompressedLinear]:
    """Layers of the shapes that the valid files have."""
    return {"a": CompressedLinear(70, 5, bias=False), "b": CompressedLinear(8, 3, bias=False)}


def _places(packed: np.ndarray, columns: int) -> np.ndarray | None:
    """Which places are stored, by NumPy; `None` if one is beyond the last column."""
    unpacked = np.unpackbits(packed, axis=-1, bitorder="little").astype(bool)
    return None if unpacked[..., columns:].any() else unpacked[..., :columns]


def _bytes_of(file: Path, tensor: StoredTensor) -> np.ndarray:
    return np.frombuffer(file.read_bytes()[tensor.start : tensor.stop], np.uint8).reshape(tensor.shape)


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _stored(one: StoredTensor) -> Stored:
    return Stored(one.name, one.shape, one.dtype, one.load)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "config": config,
    "header": header,
    "index": index,
    "adapter": adapter,
    "mask_record": mask_record,
    "compressed": compressed,
    "old_compressed": old_compressed,
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
        "compressed": _compressed_seeds(),
        "old_compressed": _old_seeds(),
    }


def _pruned(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(rows, columns) * (torch.rand(rows, columns) < 0.5)).to(dtype)


def _compressed_seeds() -> list[bytes]:
    found = []
    for dtype in bitmask.BITS:
        tensors, columns = {"c.weight": torch.ones(2, 2, dtype=dtype), "a.bias": torch.ones(5)}, {}
        for name, shape in (("a", (5, 70)), ("b", (3, 8)), ("d", (1, 64)), ("e", (2, 3, 9))):
            packed = bitmask.compress(_pruned(math.prod(shape[:-1]), shape[-1], dtype).view(shape))
            tensors |= {f"{name}.weight": packed.values, f"{name}.bitmask": packed.bitmask}
            columns[f"{name}.weight"] = shape[-1]
        found.append(save(tensors, {COLUMNS: columns_text(columns)}))
    return found


def _old_seeds() -> list[bytes]:
    found = []
    matrices = {"a": (5, 70), "b": (3, 8), "d": (2, 1)}
    whole = {f"{name}.weight": shape for name, shape in matrices.items()} | {"a.bias": (5,), "e": (2, 3, 9)}
    for shapes in (matrices, whole):
        tensors = {"c.weight": torch.ones(2, 2)}
        for name, shape in shapes.items():
            weight = _pruned(math.prod(shape[:-1]), shape[-1], torch.bfloat16).view(shape)
            places = weight != 0
            packed = np.packbits(places.numpy(), axis=-1, bitorder="little")
            parts = {"compressed": weight[places], "bitmask": torch.from_numpy(packed), "shape": torch.tensor(shape)}
            parts["row_offsets"] = torch.zeros(shape[:-1], dtype=torch.int64)
            tensors |= {f"{name}.{part}": one for part, one in parts.items()}
        found.append(save(tensors))
    return found
