# SPDX-License-Identifier: Apache-2.0
"""Timing side by side: every round runs every contestant once."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch


@dataclass(frozen=True)
class Contestant:
    """Something to time.

    Args:
        name (`str`): Its name in the results.
        run (`Callable[[], object]`): What is timed. What it returns is freed within the timed span.
        prepare (`Callable[[], object]`, *optional*): Called before every `run`, not timed.
    """

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] | None = None


@dataclass(frozen=True)
class Rounds:
    """How many rounds a case gets.

    Args:
        seconds (`float`): The rounds of a case shall take about this long, judged by its last warm-up round.
        minimum (`int`): The fewest rounds, however long they take.
        maximum (`int`): The most rounds, however short they are.
        warmup (`int`): Rounds before these, at least 1, that are not kept.
        exact (`int`, *optional*): This many rounds, whatever the above say.
    """

    seconds: float = 45.0
    minimum: int = 5
    maximum: int = 25
    warmup: int = 1
    exact: int | None = None

    def count(self, seconds_per_round: float) -> int:
        """The number of rounds for a case whose last warm-up round took `seconds_per_round`."""
        if self.exact is not None:
            return self.exact
        return min(max(int(self.seconds / max(seconds_per_round, 1e-9)), self.minimum), self.maximum)


def time_call(run: Callable[[], object], device: torch.device) -> float:
    """
    Time one call.

    On CUDA the clock is that of the GPU: two events around the call on an idle device, so that the span holds all
    kernels of the call and any wait for the host between them, but no earlier work.

    Args:
        run (`Callable[[], object]`): What to time.
        device (`torch.device`): The device that `run` works on.

    Returns:
        `float`: Seconds.
    """
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        stream = torch.cuda.current_stream(device)
        torch.cuda.synchronize(device)
        start.record(stream)
        run()
        end.record(stream)
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def repetitions_for(run: Callable[[], object], device: torch.device, seconds: float) -> int:
    """
    How often to repeat a short call so that a sample takes long enough for the clock.

    Args:
        run (`Callable[[], object]`): The call.
        device (`torch.device`): The device that it works on.
        seconds (`float`): The time that a sample shall take at least.

    Returns:
        `int`: A power of two.
    """
    repetitions = 1
    while time_call(partial(_repeat, run, repetitions), device) < seconds:
        repetitions *= 2
    return repetitions


def repeated(contestant: Contestant, repetitions: int) -> Contestant:
    """A contestant whose samples are of many calls each; what it returns is dropped after every call."""
    return Contestant(contestant.name, partial(_repeat, contestant.run, repetitions), contestant.prepare)


def _repeat(run: Callable[[], object], repetitions: int) -> None:
    for _ in range(repetitions):
        run()


def measure_interleaved(
    contestants: Sequence[Contestant], device: torch.device, rounds: Rounds, seed: int = 0
) -> dict[str, list[float]]:
    """
    Time all contestants in interleaved rounds, each in a new random order.

    Load from elsewhere and changes of clock speed then meet all contestants alike, and ratios within a round are free
    of slow drift. Python's garbage collector runs between the rounds and not in the timed spans.

    Args:
        contestants (`Sequence[Contestant]`): What to time.
        device (`torch.device`): The device that they work on.
        rounds (`Rounds`): How many rounds.
        seed (`int`): Seed of the orders.

    Returns:
        `dict[str, list[float]]`: Seconds by name; the i-th times of all contestants are of the same round.
    """
    shuffler = random.Random(seed)
    samples: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}

    def run_round() -> dict[str, float]:
        gc.collect()
        seconds = {}
        with _garbage_collection_off():
            for contestant in shuffler.sample(contestants, len(contestants)):
                if contestant.prepare is not None:
                    contestant.prepare()
                seconds[contestant.name] = time_call(contestant.run, device)
        return seconds

    for _ in range(max(rounds.warmup, 1)):
        warmup_seconds = sum(run_round().values())
    for _ in range(rounds.count(warmup_seconds)):
        for name, seconds in run_round().items():
            samples[name].append(seconds)
    return samples


def measure_cpu_time(
    contestants: Sequence[Contestant], device: torch.device, rounds: Rounds, seed: int = 0
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """
    As [`measure_interleaved`], with the time that the process was computing next to the time that went by.

    Where other programs take the processor, the latter tells how much it was wanted. The threads must not spin while
    they wait, which `OMP_WAIT_POLICY=passive` sees to.

    Args:
        contestants (`Sequence[Contestant]`): What to time.
        device (`torch.device`): The device that they work on.
        rounds (`Rounds`): How many rounds.
        seed (`int`): Seed of the orders.

    Returns:
        `tuple[dict[str, list[float]], dict[str, list[float]]]`: Seconds of computing by name, divided by the number of
        threads, and seconds that went by.
    """
    computing: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}

    def noted(contestant: Contestant) -> Contestant:
        def run() -> None:
            begin = time.process_time()
            contestant.run()
            computing[contestant.name].append((time.process_time() - begin) / torch.get_num_threads())

        return Contestant(contestant.name, run, contestant.prepare)

    passed = measure_interleaved([noted(contestant) for contestant in contestants], device, rounds, seed)
    # those of the rounds that are kept
    return {name: times[-len(passed[name]) :] for name, times in computing.items()}, passed


def contestants_that_fit(
    contestants: Sequence[Contestant], device: torch.device
) -> tuple[list[Contestant], list[str]]:
    """
    Run every contestant once on a GPU, and tell those that its memory is too small for.

    Args:
        contestants (`Sequence[Contestant]`): What to run.
        device (`torch.device`): The device that they work on. On CPU nothing is run: memory is taken to suffice.

    Returns:
        `tuple[list[Contestant], list[str]]`: Those that fit, and the names of the others.
    """
    if device.type != "cuda":
        return list(contestants), []
    fitting, too_large = [], []
    for contestant in contestants:
        try:
            if contestant.prepare is not None:
                contestant.prepare()
            contestant.run()
            fitting.append(contestant)
        except torch.OutOfMemoryError:
            too_large.append(contestant.name)
        # what a failed run had allocated is only free once the exception is gone
        gc.collect()
        torch.cuda.empty_cache()
    return fitting, too_large


@contextmanager
def _garbage_collection_off() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
