# SPDX-License-Identifier: Apache-2.0
"""A plan next to what a GPU has and can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .plan import TrainingPlan, gigabytes


@dataclass(frozen=True)
class Estimate:
    """A plan, whether it fits a GPU, and how long a step may take there. `str()` gives a table.

    Args:
        plan ([`TrainingPlan`]): The plan.
        device_memory (`int`, *optional*): The bytes of a GPU.
        tflops (`float`): What a GPU can do, in 10¹² operations a second.
        utilization (`float`): The share of it that training is assumed to reach.
    """

    plan: TrainingPlan
    device_memory: int | None
    tflops: float
    utilization: float

    @property
    def seconds(self) -> float:
        """The estimated time of a step."""
        return self.plan.flops / (self.tflops * 1e12 * self.utilization)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data for JSON."""
        return {
            **self.plan.to_dict(),
            "device_memory": self.device_memory,
            "tflops": self.tflops,
            "utilization": self.utilization,
            "seconds": self.seconds,
        }

    def __str__(self) -> str:
        plan, seconds = self.plan, self.seconds
        lines = [str(plan), ""]
        if self.device_memory is not None:
            left = self.device_memory - plan.total
            verdict = f"leaves {gigabytes(left)} of" if left >= 0 else f"is {gigabytes(-left)} more than"
            lines.append(f"It {verdict} {gigabytes(self.device_memory)}. CUDA takes another 0.5 to 1 GB.")
        tokens = plan.gpus * plan.batch * plan.sequence / seconds
        lines.append(
            f"Estimated time: {seconds:.2g} s a step, {tokens:,.0f} tokens a second, from {plan.flops / 1e12:,.1f} "
            f"TFLOP on each GPU at {100 * self.utilization:g} % of {self.tflops:g} TFLOP/s."
        )
        return "\n".join(lines)
