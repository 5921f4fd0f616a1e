# SPDX-License-Identifier: Apache-2.0
"""Export and conversion, from folder to folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from ..checkpoints.hub import local_folder
from ..checkpoints.output import OutputFolder
from ..checkpoints.own_files import ADAPTER
from ..merge.adapter import Adapter, load_adapter
from ..tuner.adapter_files import ADAPTER_FILES
from .authors import read_authors_adapter
from .content import AdapterContent, write_adapter
from .hira import to_hira
from .report import InterchangeReport


TARGETS: Mapping[str, Callable[[Adapter], AdapterContent]] = {"hira": to_hira}
"""The methods that an SPP adapter can be exported to."""


def export_adapter(
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    to: str = "hira",
    overwrite: bool = False,
    dry_run: bool = False,
) -> InterchangeReport:
    """
    Write an SPP adapter as one of another PEFT method, which plain PEFT loads without this package.

    With `to="hira"` the factor of the weight is that of SPP bit for bit in float32 (see
    [`peft_spp.interchange.hira`]). The HiRA adapter is larger, `r · (m + n)` numbers a layer instead of `r · n + m`,
    and trained further as HiRA it no longer has the form of SPP; zeros it keeps all the same.

    Args:
        adapter (`str` or `os.PathLike`): The SPP adapter, as a local folder or the id of a repository on the Hub.
        output (`str` or `os.PathLike`): The folder to write to. It gets the whole adapter or nothing.
        to (`str`, *optional*, defaults to `"hira"`): The method; `"hira"` is the only one.
        overwrite (`bool`, *optional*, defaults to `False`): Whether an adapter that is in `output` may be replaced.
        dry_run (`bool`, *optional*, defaults to `False`): Whether to read and check, but write nothing.

    Returns:
        `InterchangeReport`: What was written.

    Raises:
        FileNotFoundError: If the adapter is not there.
        FileExistsError: If `output` must not be replaced.
        ImportError: If the installed PEFT does not have the method.
        ValueError: If the adapter is broken, or has something that the other method has not.
    """
    if to not in TARGETS:
        raise ValueError(f"cannot export to {to!r}: choose one of {', '.join(TARGETS)}")
    folder = local_folder(adapter, allow=ADAPTER_FILES)
    out = _output(output, folder, overwrite)
    content = TARGETS[to](load_adapter(folder))
    return _finish(folder, out, "SPP", content, dry_run)


def convert_adapter(
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    base: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> InterchangeReport:
    """
    Write a checkpoint of the SPP authors' code as an SPP adapter of this package.

    The factors are copied bit for bit, whichever of the two layouts the column factor has. Their scaling
    `lora_alpha / r` becomes `spp_alpha / r` with r the rows that the input factor really has: 16 / 8 becomes 32 / 16.

    Args:
        adapter (`str` or `os.PathLike`): The folder with `adapter_config.json` and `adapter_model.bin`, or the id of a
            repository on the Hub.
        output (`str` or `os.PathLike`): The folder to write to. It gets the whole adapter or nothing.
        base (`str`, *optional*): The base model to name in the new adapter, by default the one that the old one names.
        overwrite (`bool`, *optional*, defaults to `False`): Whether an adapter that is in `output` may be replaced.
        dry_run (`bool`, *optional*, defaults to `False`): Whether to read and check, but write nothing.

    Returns:
        `InterchangeReport`: What was written.

    Raises:
        FileNotFoundError: If the adapter is not there.
        FileExistsError: If `output` must not be replaced.
        ValueError: If the adapter is broken or not one of the authors' code.
    """
    folder = local_folder(adapter, allow=[CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME])
    out = _output(output, folder, overwrite)
    content = read_authors_adapter(folder, base)
    return _finish(folder, out, "SPP authors'", content, dry_run)


def _output(output: str | os.PathLike[str], adapter: Path, overwrite: bool) -> OutputFolder:
    out = OutputFolder(Path(output), overwrite, ADAPTER)
    out.check_apart_from(adapter, "adapter")
    return out


def _finish(folder: Path, out: OutputFolder, source: str, content: AdapterContent, dry_run: bool) -> InterchangeReport:
    size = sum(tensor.numel() * tensor.element_size() for tensor in content.tensors.values())
    out.check(size)
    card = content.card()
    if not dry_run:
        with out:
            write_adapter(out, content, card)
            out.publish()
    peft_type = content.config.peft_type
    return InterchangeReport(
        adapter=str(folder),
        output=str(out.path),
        source=source,
        method=str(getattr(peft_type, "value", peft_type)),
        dry_run=dry_run,
        modules={module.name: module for module in content.modules},
        others=content.others,
        overwritten=out.replaced,
        size=size,
    )
