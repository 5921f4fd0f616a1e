# SPDX-License-Identifier: Apache-2.0
"""The folder that the demo writes to."""

import shutil
from pathlib import Path


# Tells a folder that an earlier demo has written from any other.
MARKER = ".peft-spp-demo"


class OutputFolder:
    """
    The demo's files.

    Args:
        root (`Path`): The folder that holds them.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.held_out_text = root / "held_out.txt"
        self.results = root / "results.json"
        self.dense = root / "dense"
        self.pruned = root / "pruned"
        self.lora_adapter = root / "lora-adapter"
        self.lora_merged = root / "lora-merged"
        self.lora_masked = root / "lora-merged-and-masked-again"
        self.spp_adapter = root / "spp-adapter"
        self.spp_merged = root / "spp-merged"

    def check(self) -> None:
        """
        Check that the folder can be used: it is new, empty or from an earlier demo.

        Raises:
            `FileExistsError`: If there is something else in its place.
        """
        if self.root.exists() and not self.root.is_dir():
            raise FileExistsError(f"{self.root} is not a folder.")
        if self.root.exists() and any(self.root.iterdir()) and not (self.root / MARKER).is_file():
            raise FileExistsError(f"{self.root} has files that are not the demo's. Name another folder.")

    def prepare(self) -> None:
        """Create the folder, or remove the files of an earlier demo (and only those) from it, after `check`."""
        self.check()
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / MARKER).touch()
        for folder in (
            self.dense,
            self.pruned,
            self.lora_adapter,
            self.lora_merged,
            self.lora_masked,
            self.spp_adapter,
            self.spp_merged,
        ):
            if folder.exists():
                shutil.rmtree(folder)
        self.held_out_text.unlink(missing_ok=True)
        self.results.unlink(missing_ok=True)
