# SPDX-License-Identifier: Apache-2.0
"""
SPP in Axolotl, by a plug-in: `plugins: [peft_spp.axolotl.SPPPlugin]` and `adapter: spp`.

Nothing else imports this module, so Axolotl is only needed by those who use it.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftConfig, PeftModel, get_peft_model
from pydantic import BaseModel, Field
from transformers import PreTrainedModel

from .tuner import SPPConfig


ADAPTER = "spp"
"""What `adapter` is set to in Axolotl's configuration."""


class SPPArgs(BaseModel):
    """
    What the plug-in adds to Axolotl's configuration.

    Args:
        spp (`dict`, *optional*): The settings of the adapter, as [`SPPConfig`] takes them.
    """

    spp: dict[str, Any] | None = Field(
        default=None,
        json_schema_extra={"description": "Settings of the SPP adapter, as peft_spp.SPPConfig takes them."},
    )


class SPPPlugin(BasePlugin):  # type: ignore[misc]  # Axolotl is not installed where types are checked
    """Makes `adapter: spp` known to Axolotl, with the settings under `spp`."""

    def get_input_args(self) -> str:
        return f"{__name__}.{SPPArgs.__name__}"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name=ADAPTER)]

    def load_adapter(
        self, model: PreTrainedModel, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[PeftModel | None, PeftConfig] | None:
        """
        Add a new adapter to a model, or the saved one in `lora_model_dir`.

        Args:
            model (`PreTrainedModel`): The pruned base model.
            cfg (`DictDefault`): Axolotl's configuration.
            inference (`bool`, *optional*, defaults to `False`): Whether the adapter stays frozen.
            config_only (`bool`, *optional*, defaults to `False`): Whether the model is left alone.

        Returns:
            `tuple`, *optional*: The model and the adapter's configuration; `None` if another adapter is asked for.

        Raises:
            ValueError: If a setting cannot be used; the message names it.
        """
        if cfg.adapter != ADAPTER:
            return None
        if cfg.lora_model_dir:
            config = PeftConfig.from_pretrained(cfg.lora_model_dir)
            if config_only:
                return None, config
            return PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference), config
        config = _new_config(dict(cfg.spp or {}))
        if config_only:
            return None, config
        adapted = get_peft_model(model, config)
        adapted.print_trainable_parameters()
        return adapted, config


def _new_config(settings: dict[str, Any]) -> SPPConfig:
    try:
        return SPPConfig(**{"task_type": "CAUSAL_LM", **settings})
    except TypeError as error:
        raise ValueError(f"`spp` in Axolotl's configuration has a setting that SPPConfig lacks: {error}") from error
