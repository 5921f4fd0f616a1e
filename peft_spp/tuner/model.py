# SPDX-License-Identifier: Apache-2.0
"""The model that PEFT makes of a base model: which layers are adapted, and how an adapter is added."""

from __future__ import annotations

import copy
import re
import warnings
import weakref
from functools import partial
from typing import Any, ClassVar, cast

import torch
from peft.tuners.tuners_utils import _ExcludedModule, _maybe_include_all_linear_layers
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import nn

from ..sparsity.mask_record import MaskRelation
from ..weight_reads import only_describes_weight
from .adapter_tensors import check_can_be_saved
from .base_record import check_not_merged, record_base, relate_base, warn_of_dense_layers
from .config import SPPConfig
from .injection import Injection
from .layer import AdaptedLayer
from .layer_factors import SPPLayer
from .layer_types import Request, find_layer_type
from .loading import check_fits, loading_of, take_record
from .merging import MergingModel
from .module_names import put_module, wrapped_parameters
from .param_wrapper import ParamWrapper
from .settings import check_patterns, expressions
from .several_adapters import SeveralAdapters
from .state_dict import AdapterStateDict
from .targets import (
    check_not_saved_whole,
    check_task,
    heads_saved_whole,
    other_maps,
    saved_with_ties,
    tied_embeddings,
    transformer_block_linear_targets,
    warn_of_fused_experts,
    warn_of_names_without_modules,
    warn_of_other_maps,
)


_PATTERNS = ("rank_pattern", "alpha_pattern")


class SPPModel(MergingModel, SeveralAdapters, AdapterStateDict):
    """
    Creates an SPP (sparsity-preserved parameter-efficient fine-tuning) model from a pretrained, pruned model.

    The method is described in detail in https://arxiv.org/abs/2405.16057.

    Args:
        model ([`torch.nn.Module`]): The model to be adapted.
        config ([`SPPConfig`]): The configuration of the SPP model.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.
        low_cpu_mem_usage (`bool`, `optional`, defaults to `False`):
            Create empty adapter weights on meta device. Useful to speed up the loading process.

    Returns:
        `torch.nn.Module`: The SPP model.

    Example:

    ```py
    >>> from transformers import AutoModelForCausalLM
    >>> from peft import get_peft_model
    >>> from peft_spp import SPPConfig

    >>> model = AutoModelForCausalLM.from_pretrained("vuiseng9/Meta-Llama-3.1-8B-wanda-2of4")
    >>> model = get_peft_model(model, SPPConfig(task_type="CAUSAL_LM"))
    ```
    """

    prefix: str = "spp_"
    tuner_layer_cls = SPPLayer
    # the default targets are read off the model itself, see _prepare_adapter_config
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  (as in PEFT)
    # the injection in progress
    _injection: Injection | None = None
    _living: ClassVar[weakref.WeakSet[SPPModel]] = weakref.WeakSet()

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if isinstance(peft_config, dict):  # by a PeftModel, which wraps the model for a task
            check_task(model, peft_config[adapter_name])
        self._living.add(self)
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def _prepare_adapter_config(self, peft_config: SPPConfig, model_config: dict) -> SPPConfig:  # type: ignore[override]
        if peft_config.target_modules is None:
            targets = transformer_block_linear_targets(self.model, peft_config.layers_to_transform)
            if not targets and not peft_config.target_parameters:
                raise ValueError("Please specify `target_modules` or `target_parameters` in `peft_config`")
            if peft_config.target_parameters is None:
                warn_of_fused_experts(self.model)
            warn_of_other_maps(other_maps(self.model))
            peft_config.target_modules = targets or None
        elif str(peft_config.target_modules).lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            _maybe_include_all_linear_layers(peft_config, self.model)
            others = other_maps(self.model, peft_config.target_modules)
            warn_of_other_maps(others)
            peft_config.target_modules = set(peft_config.target_modules) - set(others)
        if heads := heads_saved_whole(peft_config):
            # a new list: the one that is there may be another configuration's
            peft_config.modules_to_save = [*(peft_config.modules_to_save or []), *heads]
        return peft_config

    def _check_new_adapter_config(self, config: SPPConfig) -> None:  # type: ignore[override]
        super()._check_new_adapter_config(config)
        self._check_ties(config)
        if not config.target_parameters:
            return
        # Which parameter a factor belongs to is identified by its place in the nested wrappers, so all adapters need
        # the same nesting.
        for adapter_name, other in self.peft_config.items():
            others = getattr(other, "target_parameters", None)
            if other is not config and others and set(others) != set(config.target_parameters):
                raise ValueError(
                    "When using multiple adapters with `target_parameters`, all adapters must target the same set of "
                    f"parameters, but got {sorted(config.target_parameters)} for the new adapter and {sorted(others)} "
                    f"for adapter {adapter_name!r}."
                )

    def _check_ties(self, config: SPPConfig) -> None:
        """Refuse ties that PEFT does not find, as those of modules that are wrapped already, or gets wrong."""
        wrapped = any(isinstance(one, AuxiliaryTrainingWrapper) for one in self.model.modules())
        is_tied = getattr(getattr(self.model, "config", None), "tie_word_embeddings", False)
        if config.ensure_weight_tying and wrapped and is_tied:
            raise ValueError(
                "This model already has an adapter with `modules_to_save` or `trainable_token_indices`. Another one "
                "with `ensure_weight_tying=True` would be trained untied: let it be the only adapter of its model, or "
                "leave `ensure_weight_tying` out."
            )
        if config.ensure_weight_tying and (embeddings := tied_embeddings(self.model, config.modules_to_save or [])):
            raise ValueError(
                f"`ensure_weight_tying=True` cannot keep {', '.join(embeddings)} of {type(self.model).__name__} tied: "
                "PEFT ties linear layers to one embedding, and would put a linear layer in the place of the others. "
                "Take what is tied to them out of `modules_to_save`."
            )

    def _add_modules_to_save_to_tie(self, peft_config: SPPConfig, tied_weight_keys: list[str]) -> None:  # type: ignore[override]
        embeddings = self.model.get_input_embeddings()  # type: ignore[operator]
        embedding = next(name for name, module in self.model.named_modules() if module is embeddings)
        peft_config.modules_to_save = saved_with_ties(peft_config.modules_to_save or [], embedding, tied_weight_keys)
        # an attribute and not a field, as of LoRA's configuration: the model tells it
        vars(peft_config)["modules_to_tie"] = set(tied_weight_keys)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        config = cast(SPPConfig, self.peft_config[adapter_name])
        self._leave_to_others(config, adapter_name)
        if config.is_from_file:
            check_patterns(expressions(vars(config)), [name for name, _ in model.named_modules()])
        check_can_be_saved(model, adapter_name)
        # a target that cannot be adapted is found when the walk over the model comes to it
        injection = self._injection = Injection(model, adapter_name)
        injection.on_undo(partial(vars(config).update, vars(config).copy()))
        if state_dict is not None:
            # PEFT looks for the names of the model's modules in it
            parts = ((key.rpartition(f".{self.prefix}"), tensor) for key, tensor in state_dict.items())
            state_dict = {
                f"{injection.names.wrapped(layer)}{dot}{factor}": tensor for (layer, dot, factor), tensor in parts
            }
        patterns = {name: getattr(config, name) for name in _PATTERNS}
        try:
            super().inject_adapter(
                model,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
                state_dict=state_dict,
            )
            vars(config).update(patterns)
            self._name_targets_without_wrappers(adapter_name)
            self._record_or_check_base(model, config, adapter_name)
        except BaseException:
            injection.undo()
            raise
        finally:
            self._injection = None
        if (loading := loading_of(adapter_name)) is not None:
            loading.undo.insert(0, partial(self._take_back, adapter_name, injection))
        if injection.one_block_a_row:
            r = config.r
            warnings.warn(
                f"These layers have fewer output rows than row blocks (r={r}) and get one block per row: "
                f"{', '.join(injection.one_block_a_row)}. Exclude them with `exclude_modules` or set `rank_pattern` "
                "if this is not intended.",
                stacklevel=2,
            )

    def _leave_to_others(self, config: SPPConfig, adapter_name: str) -> None:
        """Give others that share this configuration a copy: what is filled in for the new adapter is not theirs."""
        for tuner in self._living:
            for name, other in getattr(tuner, "peft_config", {}).items():
                if other is config and (tuner is not self or name != adapter_name):
                    tuner.peft_config[name] = copy.deepcopy(config)

    def _check_target_module_exists(self, peft_config: SPPConfig, key: str) -> Any:  # type: ignore[override]
        injection = self._injection
        if injection is None or not injection.wrappers:
            return super()._check_target_module_exists(peft_config, key)
        if key in injection.wrappers:
            return False
        found = super()._check_target_module_exists(peft_config, injection.names.plain(key))
        if found or isinstance(found, _ExcludedModule):
            return found
        # what PEFT makes of "all-linear" has the wrappers' parts until the adapter is in the model
        return super()._check_target_module_exists(peft_config, key)

    def _name_targets_without_wrappers(self, adapter_name: str) -> None:
        config, names = cast(SPPConfig, self.peft_config[adapter_name]), cast(Injection, self._injection).names
        if isinstance(config.target_modules, (set, list)):
            config.target_modules = type(config.target_modules)(names.plain(name) for name in config.target_modules)

    def _inject_parameters(self, peft_config: SPPConfig, model: nn.Module, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        injection, with_wrappers = cast(Injection, self._injection), peft_config
        if injection.wrappers:
            # PEFT looks for the ends of the parameters' names
            with_wrappers = copy.copy(peft_config)
            targets = peft_config.target_parameters or []
            with_wrappers.target_parameters = wrapped_parameters(model, injection.names, targets)
        names = super()._inject_parameters(with_wrappers, model, *args, **kwargs)
        # PEFT compares patterns with modules alone, and says of those of parameters that they were ignored. All are
        # used by now: until its check is over, those are out of its sight.
        plain = [injection.names.plain(name) for name in names]
        for attribute in _PATTERNS:
            patterns = getattr(peft_config, attribute)
            of_parameters = {key for key in patterns if any(re.match(rf"(.*\.)?({key})$", name) for name in plain)}
            setattr(peft_config, attribute, {key: patterns[key] for key in patterns if key not in of_parameters})
        return names

    def _record_or_check_base(self, model: nn.Module, config: SPPConfig, adapter_name: str) -> None:
        """Record the base model for a new adapter; for a saved one, check that it fits, and compare its record."""
        loading = loading_of(adapter_name)
        if loading is None:
            # if the weights of the adapter that the configuration describes are loaded later, they bring its record
            config.record_of_weights = config.base_record
            config.base_record = record_base(model, adapter_name)
            warn_of_dense_layers(config.base_record, model, adapter_name)
            warn_of_names_without_modules(model, config)
            return
        config.check_base = loading.check_base or config.check_base  # type: ignore[assignment]
        check_fits(loading.saved, model, config, adapter_name, loading.ignore_shapes)
        check_not_merged(loading.saved, model, config, adapter_name)
        take_record(loading.saved.base, model, config, adapter_name)

    def relate_base(self, adapter_name: str = "default") -> dict[str, MaskRelation]:
        """
        How the masks of this base model relate to those that an adapter was trained on.

        Args:
            adapter_name (`str`): The name of the adapter.

        Returns:
            `dict[str, str]`: For each adapted module: `"same"`; `"refined"` if the same places are zero and more are;
            or `"different"`. A module that the adapter has no record of, or whose weight is not in memory, is left
            out. Without any record the result is empty, with a warning.
        """
        config = cast(SPPConfig, self.peft_config[adapter_name])
        return relate_base(config.base_record, self.model, adapter_name)

    def _take_back(self, adapter_name: str, injection: Injection) -> None:
        """Undo the injection of an adapter whose weights cannot be loaded."""
        injection.undo()
        self.peft_config.pop(adapter_name, None)
        if not self.peft_config and hasattr(self.model, "peft_config"):
            del self.model.peft_config

    def _create_and_replace(  # type: ignore[override]
        self,
        spp_config: SPPConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
        **optional_kwargs: Any,
    ) -> None:
        if current_key is None:
            raise ValueError("Current Key shouldn't be `None`")
        injection = cast(Injection, self._injection)
        current_key = injection.names.plain(current_key)

        check_not_saved_whole(current_key, spp_config.modules_to_save)
        # Regexp matching - Find key which matches current target_name in patterns provided
        r_key = get_pattern_key(list(spp_config.rank_pattern), current_key)
        alpha_key = get_pattern_key(list(spp_config.alpha_pattern), current_key)
        r = spp_config.rank_pattern.get(r_key, spp_config.r)
        alpha = spp_config.alpha_pattern.get(alpha_key, spp_config.spp_alpha)

        if isinstance(parent, ParamWrapper) and not isinstance(target, ParamWrapper):
            # a wrapper inside of it would be saved under names that no other model has
            raise ValueError(
                f"{current_key!r} is inside a wrapper left by an adapter with other `target_parameters`. Call "
                "`unload()` and add the adapter to the base model."
            )

        # of several parameters of a module, each has a wrapper, around the wrappers of those before
        wrap_target_param = isinstance(target, ParamWrapper) and adapter_name in target.spp_A
        if isinstance(target, AdaptedLayer) and not wrap_target_param:
            injection.adds_to(target)
            target.update_layer(adapter_name, r, spp_alpha=alpha, config=spp_config)
            new_module = target
        else:
            request = Request(target, spp_config, current_key, parameter_name, self.get_model_config(self.model))
            new_module = find_layer_type(request)(
                target, adapter_name, config=spp_config, r=r, spp_alpha=alpha, module_name=current_key
            )
            if adapter_name not in self.active_adapters:
                # adding an additional adapter: it is not automatically trainable
                new_module.requires_grad_(False)
            new_module.weight_is_only_described = only_describes_weight(injection.holders(current_key), target_name)
            injection.on_undo(partial(put_module, parent, target_name, target))
            self._replace_module(parent, target_name, new_module, target)
        if r > new_module.out_features:
            injection.one_block_a_row.append(current_key)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT looks for a weight: a parameter of experts has another name, and its factors are on its device already;
        # and of a base layer that is put back, not every quantized one has a weight
        if hasattr(new_module, "base_layer") and not isinstance(new_module, ParamWrapper):
            super()._replace_module(parent, child_name, new_module, child)
        put_module(parent, child_name, new_module)
