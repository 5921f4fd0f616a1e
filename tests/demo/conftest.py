# SPDX-License-Identifier: Apache-2.0
import io
import socket
from collections.abc import Iterator

import pytest
import torch
from demo_smoke import SMOKE_CONFIG, SmokeRun
from rich.console import Console

from peft_spp.demo.output import OutputFolder
from peft_spp.demo.run import run_demo


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads only wait for each other at these sizes, for long where other processes use the cores too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
