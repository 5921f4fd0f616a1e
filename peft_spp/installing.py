# SPDX-License-Identifier: Apache-2.0
"""How to install this package, for messages and cards. A release changes the version, and with it what they say."""

from __future__ import annotations

from ._version import __version__


RELEASED = "dev" not in __version__
"""Whether a package index has this version; until then it is installed from a copy of the repository."""


def how_to_install(extra: str = "", code: str = "") -> str:
    """
    The command that installs this package, or an extra of it, and where to run it; `code` is put around the command.
    """
    extras = f"[{extra}]" if extra else ""
    requirement = f"peft-spp{extras}" if RELEASED else f".{extras}"
    # a shell would take the brackets for a pattern
    command = f'pip install "{requirement}"' if extra else f"pip install {requirement}"
    return f"{code}{command}{code}" + ("" if RELEASED else " in a copy of the peft_spp repository")
