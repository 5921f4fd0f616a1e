# SPDX-License-Identifier: Apache-2.0
"""The configuration of an adapter, and its file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any, Literal

from peft.config import PeftConfig
from peft.utils.constants import CONFIG_NAME
from peft.utils.peft_types import PeftType

from ..durable import publish, working_folder
from ..model_card import update_model_card
from ..sparsity.base_masks import BASE_MASKS, WEIGHTS_ID, BaseRecord
from .adapter_files import find_file, read_record, write_settings_id
from .settings import FORMAT_VERSION, check_choice, check_file, check_format_version, check_settings


@dataclass
class SPPConfig(PeftConfig):
    """
    This is the configuration class to store the configuration of an [`SPPModel`].

    SPP (Lu et al. 2024, https://arxiv.org/abs/2405.16057) adapts a pruned linear layer as
    `W' = W ⊙ (1 + s · P(A) ⊙ B)`, with `A` of shape `(r, in_features)`, `B` of shape `(out_features, 1)` and
    `s = spp_alpha / r`. A zero of W stays zero in training and after merging.

    Args:
        r (`int`):
            The number of row blocks, that is the rows of A. The output rows of a layer are split into r blocks as
            evenly as possible, and the rows of a block share a row of A. A layer with fewer rows than r gets one block
            a row, as if `rank_pattern` had said so.
        target_modules (`Optional[Union[List[str], str]]`):
            The names of the modules to apply the adapter to. When passing a string, a regex match will be performed.
            When passing a list of strings, either an exact match will be performed or it is checked if the name of the
            module ends with any of the passed strings. If this is specified as 'all-linear', then all linear/Conv1D
            modules are chosen (if the model is a PreTrainedModel, the output layer excluded). If this is not
            specified, every linear/Conv1D layer inside the model's transformer blocks is chosen, and no embedding,
            head, pooler or router; if the model has no such blocks, an error will be raised -- in this case, you
            should specify the target modules manually.
        exclude_modules (`Optional[Union[List[str], str]]`):
            The names of the modules to not apply the adapter. When passing a string, a regex match will be performed.
            When passing a list of strings, either an exact match will be performed or it is checked if the name of the
            module ends with any of the passed strings.
        target_parameters (`List[str]`, *optional*):
            The names of parameters to apply the adapter to, in full or by suffix, on top of `target_modules`. This is
            for weights that do not belong to a linear layer, such as the experts of a mixture in Transformers 5, where
            one parameter holds all experts: `target_parameters=['mlp.experts.gate_up_proj', 'mlp.experts.down_proj']`.
            Every expert gets its own factors, with r row blocks. Set `target_modules=[]` to adapt only these. Experts
            are adapted only if they are named here; an empty list silences the warning about them. The layout of the
            weights is read from the attribute `is_transposed` of the module, which Transformers sets where experts are
            stored as (experts, in, out). It does not work with `spp_dropout`.
        spp_alpha (`float`):
            The alpha parameter for SPP scaling: the update is multiplied by `spp_alpha / r`.
        spp_dropout (`float`):
            The dropout probability on the input of the SPP branch. Anything above 0 costs a second matmul in training.
        fan_in_fan_out (`bool`):
            Set this to True if the layer to replace stores weight like (fan_in, fan_out). For example, gpt-2 uses
            `Conv1D` which stores weights like (fan_in, fan_out) and hence this should be set to `True`. A wrong value
            is corrected with a warning.
        bias (`str`):
            Bias type for SPP. Can be 'none', 'all' or 'spp_only'. If 'all' or 'spp_only', the corresponding biases
            will be updated during training. Be aware that this means that, even when disabling the adapters, the model
            will not produce the same output as the base model would have without adaptation.
        modules_to_save (`List[str]`):
            List of modules apart from adapter layers to be set as trainable and saved in the final checkpoint.
        init_weights (`bool` or `Literal["positive"]`):
            How to initialize the weights of the adapter layers. Passing True (default) draws A from a Kaiming-uniform
            distribution and sets B to zero, so that the adapter is a no-op before training. Passing 'positive' takes
            the absolute values of the same draws for A. A change of B then scales whole rows of the weight from the
            first step on, as in IA³. It costs nothing, and ended 0.1 to 0.5 % lower in perplexity in each of 12 pairs
            of runs on two small models (docs/quality.md). On SmolLM2-135M it made no clear difference
            (docs/pretrained.md), so True stays the default, as in the paper. Passing False draws B at random
            too; this is intended for debugging purposes.
        layers_to_transform (`Union[List[int], int]`):
            The layer indices to transform. If a list of ints is passed, it will apply the adapter to the layer indices
            that are specified in this list. If a single integer is passed, it will apply the transformations on the
            layer at this index.
        layers_pattern (`Optional[Union[List[str], str]]`):
            The layer pattern name, used only if `layers_to_transform` is different from `None`. This should target the
            `nn.ModuleList` of the model, which is often called `'layers'` or `'h'`.
        rank_pattern (`dict`):
            The mapping from layer names or regexp expression to ranks which are different from the default rank
            specified by `r`. For example, `{'^model.layers.0.self_attn.k_proj': 8}`.
        alpha_pattern (`dict`):
            The mapping from layer names or regexp expression to alphas which are different from the default alpha
            specified by `spp_alpha`. For example, `{'^model.layers.0.self_attn.k_proj': 16}`.
        trainable_token_indices (`Optional[Union[List[int], dict[str, List[int]]]]`):
            Lets you specify which token indices to selectively fine-tune without requiring to re-train the whole
            embedding matrix, using the `peft.TrainableTokensModel` method: a list of indices for the model's input
            embedding layer, or a dictionary from the name of an embedding module to such a list.
        ensure_weight_tying (`bool`):
            Whether modules that the model ties, such as the embedding and the head, stay tied when `modules_to_save`
            or `trainable_token_indices` name one of them: both use the trained weight of the embedding.
            Adapters of tied `target_modules` are not tied: SPP does not adapt an embedding layer.
        check_base (`str`):
            What to do if a saved adapter is loaded onto a base model that has other masks than the one it was trained
            on, or is dense: 'warn' (default), 'error', or 'off'. A base model that is pruned in the same
            places and more, as after rounding to NF4, is accepted silently. With 'error', an adapter without a record
            of its base model is refused too.
        format_version (`int`):
            The version of the adapter's format. Do not set this.

    Raises:
        ValueError: If a value cannot be used; the message names the field and the value.
    """

    r: int = field(
        default=16, metadata={"help": "The number of row blocks, which is the number of rows of the factor A."}
    )
    target_modules: list[str] | set[str] | str | None = field(
        default=None,
        metadata={
            "help": "List of module names or regex expression of the module names to replace with SPP. For example, "
            "['q_proj', 'v_proj'] or '.*decoder.*(SelfAttention|EncDecAttention).*(q|v)$'. This can also be a "
            "wildcard 'all-linear' which matches all linear/Conv1D (if the model is a PreTrainedModel, the output "
            "layer excluded). If not specified, every linear/Conv1D layer inside the transformer blocks is adapted."
        },
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None,
        metadata={"help": "List of module names or regex expression of the module names to exclude from SPP."},
    )
    target_parameters: list[str] | set[str] | None = field(
        default=None,
        metadata={
            "help": "List of parameter names to apply SPP to, on top of `target_modules`. This is for weights that do "
            "not belong to a linear layer, such as the fused experts of mixtures. For example, "
            "`['mlp.experts.gate_up_proj', 'mlp.experts.down_proj']`. Passing a string for regex matching is not "
            "implemented. With torch.compile, graph breaks are expected."
        },
    )
    spp_alpha: float = field(default=32, metadata={"help": "SPP alpha: the update is scaled by spp_alpha / r."})
    spp_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of the SPP branch."})
    fan_in_fan_out: bool = field(
        default=False,
        metadata={"help": "Set this to True if the layer to replace stores weight like (fan_in, fan_out)"},
    )
    bias: Literal["none", "all", "spp_only"] = field(
        default="none", metadata={"help": "Bias type for SPP. Can be 'none', 'all' or 'spp_only'"}
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={
            "help": "List of modules apart from SPP layers to be set as trainable and saved in the final checkpoint. "
            "For example, in Sequence Classification or Token Classification tasks, "
            "the final layer `classifier/score` are randomly initialized and as such need to be trainable and saved."
        },
    )
    init_weights: bool | Literal["positive"] = field(
        default=True,
        metadata={
            "help": "Whether to initialize B to zero, so that the adapter is a no-op before training. False "
            "initializes it randomly, for debugging only. 'positive' initializes A to absolute values."
        },
    )
    layers_to_transform: list[int] | int | None = field(
        default=None,
        metadata={
            "help": "The layer indexes to transform. If this argument is specified, PEFT will transform only the "
            "layers at the indexes in this list. If a single integer is passed, PEFT will transform only the layer at "
            "this index. This only works when target_modules is a list of str or None."
        },
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "The layer pattern name, used only if `layers_to_transform` is different to None and if the layer "
            "pattern is not in the common layers pattern. This should target the `nn.ModuleList` of the model, which "
            "is often called `'layers'` or `'h'`."
        },
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={
            "help": "The mapping from layer names or regexp expression to ranks which are different from the default "
            "rank specified by `r`. For example, `{'^model.layers.0.self_attn.k_proj': 8}`."
        },
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict,
        metadata={
            "help": "The mapping from layer names or regexp expression to alphas which are different from the default "
            "alpha specified by `spp_alpha`. For example, `{'^model.layers.0.self_attn.k_proj': 16}`."
        },
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None,
        metadata={
            "help": "Which token indices to selectively fine-tune without requiring to re-train the whole embedding "
            "matrix: a list for the model's input embedding layer, or a dictionary from the name of an embedding "
            "module to a list, e.g. `{'embed_tokens': [0, 1]}`."
        },
    )

    ensure_weight_tying: bool = field(
        default=False,
        metadata={
            "help": "Whether modules that the model ties, such as the embedding and the head, stay tied when "
            "`modules_to_save` or `trainable_token_indices` name one of them. Adapters of tied `target_modules` are "
            "not tied."
        },
    )
    check_base: Literal["warn", "error", "off"] = field(
        default="warn",
        metadata={
            "help": "What to do if a saved adapter is loaded onto a base model with other masks than the one it was "
            "trained on. Can be 'warn', 'error' or 'off'"
        },
    )
    format_version: int = field(
        default=FORMAT_VERSION, metadata={"help": "The version of the adapter's format. Do not set this."}
    )

    # Says which weights the settings were saved with. It is in the file and not a field, as it says nothing about the
    # adapter: see saving.py.
    weights_id: InitVar[str | None] = None

    def __post_init__(self, weights_id: str | None) -> None:
        super().__post_init__()
        if isinstance(self.target_parameters, str):
            raise TypeError("`target_parameters` must be a list of strings or None.")  # as of LoRA's configuration
        check_settings({**vars(self), "weights_id": weights_id})
        # The masks that the adapter was trained on, saved in a file next to this. Not a field: it is not a setting,
        # and people and loggers do not read it.
        self.base_record: BaseRecord | None = None
        # the record of the saved adapter whose configuration this is, until weights are loaded
        self.record_of_weights: BaseRecord | None = None
        # whether somebody else may have written the settings
        self.is_from_file = False
        self.peft_type = PeftType.SPP  # type: ignore[attr-defined]  # the member is added by registration.py
        for name in ("target_modules", "exclude_modules"):
            if isinstance(names := getattr(self, name), list):
                setattr(self, name, set(names))
        self.rank_pattern = self.rank_pattern or {}
        self.alpha_pattern = self.alpha_pattern or {}
        check_format_version(self.format_version)

    @classmethod
    def paper(cls, **settings: Any) -> SPPConfig:
        """
        The setting of the paper's experiments, as the authors' training scripts have it: 16 row blocks, a scaling of
        2, and a dropout of 0.05 on the input of the SPP branch.

        It differs from the defaults in the dropout alone, which costs a second matmul in training and changed little
        in our ablation (docs/quality.md). What an adapter's configuration does not cover is up to the trainer: the
        authors train with AdamW for 3 epochs with a learning rate of 4e-3, batches of 128 and a weight decay of 0.001.

        Args:
            settings (additional keyword arguments, *optional*): Other fields, or other values for these.

        Returns:
            [`SPPConfig`]: The configuration.
        """
        return cls(**({"r": 16, "spp_alpha": 32, "spp_dropout": 0.05} | settings))

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """
        Save the configuration and the record of the base model's masks, and describe the adapter in its model card, if
        there is one.

        The files are complete or unchanged, whenever the process is killed.

        Args:
            save_directory (`str`): The directory where the configuration will be saved.
            kwargs (additional keyword arguments, *optional*): As [`PeftConfig.save_pretrained`] takes them.

        Raises:
            OSError: If the disk is full; the existing files are unchanged.
        """
        if os.path.isfile(save_directory):
            raise AssertionError(f"Provided path ({save_directory}) should be a directory, not a file")
        with working_folder(save_directory) as working:
            super().save_pretrained(str(working), **kwargs)
            write_settings_id(working, self.base_record)
            for name in (BASE_MASKS, CONFIG_NAME):
                publish(working / name, Path(save_directory) / name)
        update_model_card(save_directory, self)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> SPPConfig:
        """
        Load the configuration of an adapter, and the record of its base model's masks: from a local folder, or from
        the Hub. The weights are not read; [`PeftModel.from_pretrained`] and the like check them.

        Args:
            pretrained_model_name_or_path (`str`): The directory or the Hub repository id where the adapter is saved.
            subfolder (`str`, *optional*): An optional subfolder under `pretrained_model_name_or_path`.
            kwargs (additional keyword arguments, *optional*):
                As [`PeftConfig.from_pretrained`] takes them, and `check_base`. [`PeftModel.from_pretrained`] passes
                all of them on.

        Raises:
            ValueError: If a value of the configuration cannot be used, or the record does not belong to it.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if not isinstance(config, SPPConfig):
            return config  # the adapter of another method, as PEFT loads it too
        config.is_from_file = True
        hub_arguments, _, _ = cls._split_kwargs(kwargs)
        files = [
            find_file(pretrained_model_name_or_path, name, subfolder, hub_arguments)
            for name in (CONFIG_NAME, BASE_MASKS)
        ]
        if files[0] is not None:
            config.base_record, _ = read_record(files[0], files[1])
        config.set_check_base(kwargs)
        return config

    def set_check_base(self, kwargs: Mapping[str, Any]) -> None:
        """Take `check_base` from the arguments of a call that loads an adapter: what is saved does not override it."""
        if "check_base" in kwargs:
            check_choice("check_base", kwargs["check_base"], ("warn", "error", "off"))
            self.check_base = kwargs["check_base"]

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """
        Read the settings of an adapter from a file, and check them.

        Args:
            path_json_file (`str`): The file.

        Returns:
            `dict[str, Any]`: The settings, as [`to_dict`] returns them.

        Raises:
            ValueError: If it is not a JSON object, is of a newer version, or has a value that cannot be used; the
                message names the file.
        """
        check_file(Path(path_json_file))
        settings = super().from_json_file(path_json_file, **kwargs)
        settings.pop(WEIGHTS_ID, None)
        return settings
