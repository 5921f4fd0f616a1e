# SPDX-License-Identifier: Apache-2.0
"""Memory and time of training, computed before there is a model or a GPU."""

from .plan import TrainingPlan, plan_checkpoint, plan_training


__all__ = ["TrainingPlan", "plan_checkpoint", "plan_training"]
