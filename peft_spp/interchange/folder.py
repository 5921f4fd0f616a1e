# SPDX-License-Identifier: Apache-2.0
"""Writing an adapter to a folder: all of it, or nothing."""

from __future__ import annotations

import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from ..durable import sync_file
from ..model_card import CARD
from .content import AdapterContent


def check_output(output: Path, source: Path, overwrite: bool) -> None:
    """
    Check that an adapter may be written to a folder.

    Args:
        output (`Path`): The folder.
        source (`Path`): The folder that is read.
        overwrite (`bool`): Whether an adapter in it may be replaced.

    Raises:
        FileExistsError: If there is something that must not be replaced.
        ValueError: If one of the two folders is inside the other, or both are the same.
    """
    source, output = source.resolve(), output.resolve()
    if source == output or source in output.parents or output in source.parents:
        raise ValueError(f"the output folder {output} and the adapter {source} must not contain each other")
    if not output.exists():
        return
    if not output.is_dir():
        raise FileExistsError(f"the output {output} is a file; name a folder")
    if not any(output.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(f"the output folder {output} is not empty; name another, or ask to overwrite it")
    if not (output / CONFIG_NAME).is_file():
        raise FileExistsError(f"the output folder {output} holds something else than an adapter; name another")


def write_adapter(output: Path, content: AdapterContent) -> None:
    """
    Write an adapter into a hidden folder beside the output folder, and put it in its place.

    Args:
        output (`Path`): The folder, which [`check_output`] has passed. What is in it is replaced.
        content (`AdapterContent`): The adapter.
    """
    output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(4)
    working = output.with_name(f".{output.name}.writing-{token}")
    aside = output.with_name(f".{output.name}.replaced-{token}")
    working.mkdir()
    try:
        save_file(dict(content.tensors), working / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        content.card().save(working / CARD)
        content.config.save_pretrained(str(working))
        for file in working.iterdir():
            sync_file(file)
        if not output.exists():
            os.rename(working, output)
            return
        os.rename(output, aside)
        try:
            os.rename(working, output)
        except BaseException:
            with suppress(OSError):  # something else has taken the place; the old adapter stays beside it
                os.rename(aside, output)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(working, ignore_errors=True)
