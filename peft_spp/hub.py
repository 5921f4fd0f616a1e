# SPDX-License-Identifier: Apache-2.0
"""Sharing an adapter on the Hub, with a model card that describes it."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft import PeftModel

from .model_card import CARD, PLACEHOLDER, drop_local_base_model, why_unreadable


def push_to_hub(
    model: PeftModel,
    repo_id: str,
    *,
    token: bool | str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    commit_message: str = "Upload SPP adapter",
    create_pr: bool = False,
    **kwargs: Any,
) -> str:
    """
    Upload the adapters of a model to the Hub, and with them the model card that `save_pretrained` writes.

    `model.push_to_hub(repo_id)` uploads the same files except the card: in Transformers 5 it replaces the one that
    `save_pretrained` has written with its own, made for whole models.

    Args:
        model ([`PeftModel`]): The model with the adapters.
        repo_id (`str`): The repository, which is created if it does not exist. A card in it is kept and updated.
        token (`bool` or `str`, *optional*): The token to use. By default, the stored one.
        revision (`str`, *optional*): The branch to push to, which is created if it does not exist.
        private (`bool`, *optional*): Whether the repository is private, if it is created.
        commit_message (`str`, *optional*, defaults to `"Upload SPP adapter"`): The message of the commit.
        create_pr (`bool`, *optional*, defaults to `False`): Whether to open a pull request.
        **kwargs (`optional`): Additional keyword arguments of [`PeftModel.save_pretrained`].

    Returns:
        `str`: The URL of the commit.

    Raises:
        ValueError: If `is_main_process` is `False`.
    """
    if not kwargs.get("is_main_process", True):
        raise ValueError("is_main_process=False saves nothing to upload: call push_to_hub in the main process only")
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with TemporaryDirectory() as name:
        folder = Path(name)
        try:
            shutil.copyfile(api.hf_hub_download(repo_id, CARD, revision=revision), folder / CARD)
        except EntryNotFoundError as error:
            # there is no card to keep, unless nobody could be asked
            if isinstance(error, LocalEntryNotFoundError):
                raise
        model.save_pretrained(str(folder), **kwargs)
        if why_unreadable(folder / CARD) is not None:
            # it stays as it is, as `save_pretrained` has warned; the Hub would refuse it
            (folder / CARD).unlink()
        else:
            card = ModelCard.load(folder / CARD)
            drop_local_base_model(card)
            card.text = card.text.replace(PLACEHOLDER, repo_id)
            card.save(folder / CARD)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
        )
    return str(commit)
