# SPDX-License-Identifier: Apache-2.0
import io
import socket

import pytest
from demo_smoke import SMOKE_CONFIG, SmokeRun
from rich.console import Console

from peft_spp.demo.output import OutputFolder
from peft_spp.demo.run import run_demo

from helpers.one_thread import one_thread as one_thread


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory: pytest.TempPathFactory) -> SmokeRun:
    """The demo with tiny sizes, run once, without a network."""
    output = OutputFolder(tmp_path_factory.mktemp("demo") / "out")
    shown = io.StringIO()

    def refuse(*args: object) -> None:
        raise AssertionError("the demo opened a network connection")

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(socket.socket, "connect", refuse)
        checks = run_demo(output, SMOKE_CONFIG, Console(file=shown, width=120, force_terminal=True))
    return SmokeRun(output, SMOKE_CONFIG, checks, shown.getvalue())
