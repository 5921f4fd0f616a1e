# SPDX-License-Identifier: Apache-2.0
"""Signals that stop a command: what it has not finished is removed, and no signal is lost."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from peft_spp.commands.signals import Stopped, signals_as_errors


ROOT = Path(__file__).parents[2]


STOPPED = """
import os, signal, sys, time, typer
from pathlib import Path
import peft_spp_command
peft_spp_command.starting = True  # PyTorch is not needed
from peft_spp.commands.exit_codes import CommandGroup
from peft_spp.durable import working_folder

commands = typer.Typer(cls=CommandGroup)

class Dropped:
    def __del__(self):
        os.kill(os.getpid(), number)
        time.sleep(0.01)

@commands.command()
def write():
    with working_folder(Path("out")) as folder:
        (folder / "half").write_text("half")
        {send}
        time.sleep(1000)

@commands.command()
def other(): ...

number = getattr(signal, sys.argv.pop())
commands(["write"])
"""
SENT = {
    "once": "os.kill(os.getpid(), number)",
    # Python prints what is raised in a destructor, and goes on
    "in a destructor": "Dropped()",
    "again while removing": (
        "import shutil; remove = shutil.rmtree; "
        "shutil.rmtree = lambda *a, **k: (os.kill(os.getpid(), number), time.sleep(1.5), remove(*a, **k)); "
        "os.kill(os.getpid(), number)"
    ),
}


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
@pytest.mark.parametrize("sent", SENT)
@pytest.mark.parametrize(
    ("name", "said"),
    [("SIGINT", "Interrupted."), ("SIGTERM", "Stopped by SIGTERM."), ("SIGHUP", "Stopped by SIGHUP.")],
)
def test_a_signal_ends_a_command_and_leaves_nothing_half_written(
    name: str, said: str, sent: str, tmp_path: Path
) -> None:
    program = STOPPED.replace("{send}", SENT[sent])
    done = subprocess.run(
        [sys.executable, "-c", program, name],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        # the shell that starts the tests may have them ignored
        preexec_fn=lambda: [signal.signal(getattr(signal, one), signal.SIG_DFL) for one in ("SIGINT", "SIGHUP")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 128 + getattr(signal, name)
    assert done.stderr.splitlines()[-1] == said and list(tmp_path.iterdir()) == []
    assert ("Traceback" in done.stderr) is (sent == "in a destructor")


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs SIGHUP")
def test_a_signal_that_is_ignored_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_as_errors():
            signal.raise_signal(signal.SIGHUP)
            with pytest.raises(Stopped):
                signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs setitimer")
def test_the_alarm_is_given_back() -> None:
    """A notebook goes on after a command that was stopped, and may use it."""
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(Stopped), signals_as_errors():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGALRM) == before and signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("wait", [0.0, 0.5])
def test_a_worker_ends_by_the_signal_and_not_as_the_command(wait: float) -> None:
    """Also by one that comes right after it was forked, which Python forgets."""
    with signals_as_errors():
        for _ in range(2 if wait else 20):
            worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(5,))
            worker.start()
            time.sleep(wait)
            worker.terminate()
            worker.join()
            assert worker.exitcode == -signal.SIGTERM


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_ctrl_c_while_the_program_starts_prints_no_traceback() -> None:
    program = """
import sys
class Finder:
    def find_spec(self, name, *_):
        if name == "peft_spp.cli":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Finder())
from peft_spp_command import main
main()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (130, "")
