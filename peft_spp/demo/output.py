# SPDX-License-Identifier: Apache-2.0
"""The folder that the demo writes to."""

from pathlib import Path

from ..checkpoints.own_files import ADAPTER, MODEL, FolderKind, scan
from ..checkpoints.replacing import remove
from ..reports import some


# Tells a folder that an earlier demo has written from any other.
MARKER = ".peft-spp-demo"

# a demo that was stopped leaves folders that are not yet models or adapters
_FILES = FolderKind(
    "the demo",
    lambda folder: True,
    lambda folder, names: (
        MODEL.own(folder, names) | ADAPTER.own(folder, names) | {"training_args.bin"}.intersection(names)
    ),
)


class OutputFolder:
    """The demo's files."""

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

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders of the models and adapters."""
        adapters = self.lora_adapter, self.spp_adapter
        return self.dense, self.pruned, *adapters, self.lora_merged, self.lora_masked, self.spp_merged

    def check(self) -> None:
        """Check that the folder can be used: it is new, empty or from an earlier demo."""
        if self.root.exists() and not self.root.is_dir():
            raise FileExistsError(f"{self.root} is not a folder.")
        if self.root.exists() and any(self.root.iterdir()) and not (self.root / MARKER).is_file():
            raise FileExistsError(f"{self.root} contains files that are not from the demo. Choose another folder.")
        foreign = [name for folder in self.folders for name in self._foreign(folder)]
        if foreign:
            raise FileExistsError(
                f"{self.root} contains files that are not from the demo and would be lost: {some(foreign)}. Move "
                "them, or choose another folder."
            )

    def _foreign(self, folder: Path) -> list[str]:
        if folder.is_symlink() or folder.is_file():
            return [folder.name]
        if not folder.exists():
            return []
        return [f"{folder.name}/{name}" for name in _FILES.foreign(folder, scan(folder))]

    def prepare(self) -> None:
        """Create the folder, or remove the files of an earlier demo (and only those) from it, after `check`."""
        self.check()
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / MARKER).touch()
        for folder in self.folders:
            if folder.exists():
                remove(folder, scan(folder))
        self.held_out_text.unlink(missing_ok=True)
        self.results.unlink(missing_ok=True)
