# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, Literal, cast

import torch
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
)
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..sparsity.layout import model_types
from ..sparsity.mask_record import MaskRelation
from ..sparsity.names import unwrapped_name
from .adapter_tensors import belongs_to, check_can_be_saved, other_adapters, restore_tensors
from .base_record import record_base, relate_base
from .combination import activate_weighted_adapters, add_weighted_adapter
from .config import SPPConfig
from .injection import Injection
from .layer import Linear, SPPLayer
from .loading import check_fits, check_loaded, loading_of, take_record
from .merged_marker import check_not_merged, mark_merged, merged_ids
from .mixed_batches import passed_to_layers
from .module_names import ModuleNames, own_modules, put_module, wrapped_parameters
from .param_wrapper import ParamWrapper, is_stored_transposed
from .patterns import check_patterns
from .quantized import QuantizedLinear, find_backend, unload_dequantized
from .settings import expressions
from .target_checks import (
    check_layer,
    check_not_saved_whole,
    check_weight,
    warn_of_fused_experts,
    warn_of_other_maps,
)
from .targets import other_maps, transformer_block_linear_targets
from .task_checks import check_task, heads_saved_whole
from .tied_weights import untie_adapted_weights
from .weight_reads import only_describes_weight


class SPPModel(BaseTuner):
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

    **Attributes**:

    - **model** ([`~transformers.PreTrainedModel`]) -- The model to be adapted.
    - **peft_config** ([`SPPConfig`]): The configuration of the SPP model.
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
        if not config.target_parameters:
            return
        # Which parameter a factor belongs to is told by its place in the nested wrappers, so all adapters need the
        # same nesting.
        for adapter_name, other in self.peft_config.items():
            others = getattr(other, "target_parameters", None)
            if other is not config and others and set(others) != set(config.target_parameters):
                raise ValueError(
                    "When using multiple adapters with `target_parameters`, all adapters must target the same set of "
                    f"parameters, but got {sorted(config.target_parameters)} for the new adapter and {sorted(others)} "
                    f"for adapter {adapter_name!r}."
                )

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
        check_patterns(expressions(vars(config)), [name for name, _ in model.named_modules()])
        check_can_be_saved(model, adapter_name)
        # A target that cannot be adapted is found when the walk over the model comes to it. What was done up to there
        # is undone, so that a failed call leaves the model as it was.
        injection = self._injection = Injection(model, adapter_name)
        injection.on_undo(partial(vars(config).update, vars(config).copy()))
        if state_dict is not None:
            # PEFT looks for the names of the model's modules in it
            parts = ((key.rpartition(f".{self.prefix}"), tensor) for key, tensor in state_dict.items())
            state_dict = {
                f"{injection.names.wrapped(layer)}{dot}{factor}": tensor for (layer, dot, factor), tensor in parts
            }
        try:
            super().inject_adapter(
                model,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
                state_dict=state_dict,
            )
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
                f"These layers have fewer output rows than row blocks (r={r}) and get one block a row: "
                f"{', '.join(injection.one_block_a_row)}. Exclude them with `exclude_modules` or set `rank_pattern` "
                "if this is not intended.",
                stacklevel=2,
            )

    def _leave_to_others(self, config: SPPConfig, adapter_name: str) -> None:
        """
        Give every other adapter that has this very configuration a copy of it.

        What is filled in for the new adapter, the record of its base model included, is then not taken for theirs.
        """
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
        injection = cast(Injection, self._injection)
        if injection.wrappers:
            # PEFT looks for the ends of the parameters' names
            peft_config = copy.copy(peft_config)
            targets = peft_config.target_parameters or []
            peft_config.target_parameters = wrapped_parameters(model, injection.names, targets)
        return super()._inject_parameters(peft_config, model, *args, **kwargs)

    def _record_or_check_base(self, model: nn.Module, config: SPPConfig, adapter_name: str) -> None:
        """Record the base model for a new adapter; for a saved one, check that it fits, and compare its record."""
        loading = loading_of(adapter_name)
        if loading is None:
            # if the weights of the adapter that the configuration describes are loaded later, they bring its record
            config.record_of_weights = config.base_record
            config.base_record = record_base(model, adapter_name)
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
            out. Without any record the result is empty, and a warning says so.
        """
        config = cast(SPPConfig, self.peft_config[adapter_name])
        return relate_base(config.base_record, self.model, adapter_name)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # This runs before the factors' own, so nothing is loaded yet where shapes do not fit.
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        own = {
            f"{prefix}{name}": parameter
            for name, parameter in self.named_parameters(remove_duplicate=False)
            if f".{self.prefix}" in name
        }
        misfits = [key for key, p in own.items() if key in state_dict and state_dict[key].shape != p.shape]
        if misfits:
            shown = "; ".join(
                f"{key} is {tuple(state_dict[key].shape)} in the adapter, {tuple(own[key].shape)} in the model"
                for key in misfits[:3]
            )
            raise RuntimeError(
                f"size mismatch for {len(misfits)} tensors of the adapter: {shown}. The adapter was trained on a base "
                "model of other shapes, or with another `r`. Nothing was loaded."
            )

    @classmethod
    def _get_adapter_state_dict(  # type: ignore[override]
        cls, model: nn.Module, state_dict: dict[str, torch.Tensor], **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        adapter_name = kwargs["adapter_name"]
        restore_tensors(model, adapter_name, state_dict)
        names = ModuleNames(model)
        keys = {names.peft_key(key): key for key in state_dict}
        selected = super()._get_adapter_state_dict(
            model=model, state_dict={name: state_dict[key] for name, key in keys.items()}, **kwargs
        )
        # PEFT reads `modules_to_save` and the like out of the same dictionary afterwards
        state_dict.update({name: state_dict[key] for name, key in keys.items() if name != key})
        others = other_adapters(model, adapter_name)
        selected = {key: tensor for key, tensor in selected.items() if not any(belongs_to(key, one) for one in others)}
        return {names.plain(key): tensor for key, tensor in selected.items()}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        without: str = super()._remove_adapter_name_from_key(unwrapped_name(key), adapter_name)
        return without

    @classmethod
    def _remap_adapter_state_dict_for_load(  # type: ignore[override]
        cls, model: nn.Module, config: SPPConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        keys = ModuleNames(model).keys_of(model.state_dict())
        for name, module in own_modules(model):
            if isinstance(module, SPPLayer) and adapter_name in module.spp_A:
                for factor in module.adapter_layer_names:
                    key = keys[f"{name}.{factor}.{adapter_name}.weight"]
                    keys[f"{name}.{factor}.weight"] = key
        # a model that has its adapters without a `PeftModel` around it does not have the prefix of the saved names
        remapped = {
            keys.get(name) or keys.get(name.removeprefix("base_model.model."), name): tensor
            for name, tensor in ((unwrapped_name(key), tensor) for key, tensor in state_dict.items())
        }
        check_loaded(model, config, adapter_name, remapped)
        return remapped

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
                f"{current_key!r} is inside a wrapper that an adapter with other `target_parameters` has left. Call "
                "`unload()` and add the adapter to the base model."
            )

        # of several parameters of a module, each has a wrapper, around the wrappers of those before
        wrap_target_param = isinstance(target, ParamWrapper) and adapter_name in target.spp_A
        if isinstance(target, Linear) and not wrap_target_param:
            injection.adds_to(target)
            target.update_layer(adapter_name, r, spp_alpha=alpha, config=spp_config)
            new_module = target
        else:
            new_module = self._create_new_module(
                spp_config,
                adapter_name,
                target,
                r=r,
                spp_alpha=alpha,
                module_name=current_key,
                parameter_name=parameter_name,
            )
            if adapter_name not in self.active_adapters:
                # adding an additional adapter: it is not automatically trainable
                new_module.requires_grad_(False)
            new_module.weight_is_only_described = only_describes_weight(injection.holders(current_key), target_name)
            injection.on_undo(partial(put_module, parent, target_name, target))
            self._replace_module(parent, target_name, new_module, target)
        if r > new_module.out_features:
            injection.one_block_a_row.append(current_key)

    def _create_new_module(
        self,
        spp_config: SPPConfig,
        adapter_name: str,
        target: nn.Module,
        module_name: str,
        parameter_name: str | None,
        **kwargs: Any,
    ) -> Linear:
        base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if parameter_name is not None:
            parameter = getattr(base_layer, parameter_name)
            check_weight(parameter, f"Target parameter {module_name!r}", dimensions=(2, 3))
            types = model_types(self.get_model_config(self.model))
            return ParamWrapper(
                target,
                adapter_name,
                parameter_name=parameter_name,
                config=spp_config,
                is_transposed=is_stored_transposed(base_layer, parameter, types),
                module_name=module_name,
                **kwargs,
            )
        backend = find_backend(base_layer)
        check_layer(base_layer, module_name, backend)
        is_conv1d = isinstance(base_layer, Conv1D)
        fan_in_fan_out = spp_config.fan_in_fan_out
        if fan_in_fan_out is not is_conv1d:
            layer_type = "`Conv1D`" if is_conv1d else "`torch.nn.Linear`"
            warnings.warn(
                f"fan_in_fan_out is set to {fan_in_fan_out} but the target module is {layer_type}. "
                f"Setting fan_in_fan_out to {is_conv1d}.",
                stacklevel=2,
            )
            spp_config.fan_in_fan_out = is_conv1d
        layer_cls: Callable[..., Linear] = Linear if backend is None else partial(QuantizedLinear, backend=backend)
        return layer_cls(
            target,
            adapter_name,
            config=spp_config,
            fan_in_fan_out=is_conv1d,
            is_target_conv_1d_layer=is_conv1d,
            module_name=module_name,
            **kwargs,
        )

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        untie_adapted_weights(self.model)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if hasattr(new_module, "base_layer") and not isinstance(new_module, ParamWrapper):
            super()._replace_module(parent, child_name, new_module, child)
            put_module(parent, child_name, new_module)
        else:
            # PEFT would look for a weight: a parameter of experts has another name, and its factors are on its device
            # already; and of a base layer that is put back, not every quantized one has a weight
            put_module(parent, child_name, new_module)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        for module in self._plain_layers():
            module.check_merge_stays()
        self._check_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(  # type: ignore[override]
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            for module in self._plain_layers():
                module.check_unload_stays()
            self._check_merge(adapter_names, safe_merge)
        return super()._unload_and_optionally_merge(  # type: ignore[return-value]
            merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        dequantize: bool = False,
    ) -> nn.Module:
        """
        This method merges the adapter layers into the base model and returns it without them.

        Args:
            progressbar (`bool`):
                whether to show a progressbar indicating the unload and merge process (default: False).
            safe_merge (`bool`):
                whether to activate the safe merging check to check if there is any potential Nan in the adapter
                weights.
            adapter_names (`List[str]`, *optional*):
                The list of adapter names that should be merged. If None, all active adapters will be merged. Defaults
                to `None`.
            dequantize (`bool`):
                whether to return a model whose quantized layers, adapted or not, are plain linear layers in the dtype
                of the model's other parameters. The merged weights are not rounded to the quantized format then. By
                default they are quantized again as the base model is.

        Returns:
            `torch.nn.Module`: The base model.

        Raises:
            ValueError: If a merged weight is not finite and `safe_merge` is set or it is to be quantized, or if
                quantizing would lose a zero. The model is as it was before.
        """
        identities = merged_ids(self.model, adapter_names or list(self.active_adapters))
        if dequantize:
            self._check_merge(adapter_names, safe_merge, quantized=False)
            self._check_merge_allowed()
            unload_dequantized(self.model, adapter_names, safe_merge)
        merged: nn.Module = super().merge_and_unload(
            progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )
        mark_merged(merged, identities)
        return merged

    def _plain_layers(self) -> list[Linear]:
        modules = self.model.modules()
        return [one for one in modules if isinstance(one, Linear) and not isinstance(one, QuantizedLinear)]

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool, quantized: bool = True) -> None:
        """Check all layers before the first one is merged, so that a broken adapter leaves no half-merged model."""
        names = self.active_adapters if adapter_names is None else adapter_names
        for module in self.model.modules():
            if isinstance(module, Linear):
                module.follow_base_layer()
                if any(name in module.spp_A for name in names):
                    module.check_writable()
        for module in self.model.modules():
            if isinstance(module, QuantizedLinear):
                if quantized:  # a weight may not survive quantizing, safe merge or not
                    module.check_merge(adapter_names)
            elif safe_merge and isinstance(module, Linear):
                module.check_merge(adapter_names)

    def set_weighted_adapters(
        self, adapters: Sequence[str], weights: Sequence[float], inference_mode: bool = False
    ) -> None:
        """
        Make several adapters active, each with a weight: `W' = W ⊙ (1 + Σ weight · s · P(A) ⊙ B)`, exactly.

        This is the weighted sum that [`add_weighted_adapter`] approximates. It costs hardly more than one adapter, and
        `merge_and_unload()` merges it into one weight. Training goes on with these weights too; saved adapters do not
        have them.

        Args:
            adapters (`List[str]`): The names of the adapters.
            weights (`List[float]`): The weight of each of them; negative ones subtract.
            inference_mode (`bool`, *optional*, defaults to `False`): Whether the adapters are frozen.

        Raises:
            ValueError: If an adapter does not exist or is merged, or the weights are not one finite number for each.
        """
        activate_weighted_adapters(self, adapters, weights, inference_mode)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: Literal["rank_one_svd"] = "rank_one_svd",
        svd_rank: int | None = None,
    ) -> dict[str, float]:
        """
        Add the single adapter that comes closest to a weighted sum of adapters.

        The sum of SPP adapters is not an SPP adapter: in each row block the update is a sum of matrices of rank one.
        `"rank_one_svd"` takes the best rank-one approximation of each block, by a singular value decomposition of the
        factor that multiplies the weight (not of the weight's own change). How good that is, the returned errors say.
        For the exact sum use [`set_weighted_adapters`].

        The new adapter is frozen and not active, and only factors are combined.

        Args:
            adapters (`List[str]`): The names of the adapters to combine. Their ranks and targets may differ.
            weights (`List[float]`): The weight of each of them; negative ones subtract.
            adapter_name (`str`): The name of the new adapter.
            combination_type (`str`): How they are combined: `"rank_one_svd"`.
            svd_rank (`int`, *optional*):
                The `r` of the new adapter, by default the largest rank of any of the adapters. The more row blocks,
                the smaller is the error.

        Returns:
            `Dict[str, float]`: For each adapted module the relative error of `Σ weight · s · P(A) ⊙ B` in the
            Frobenius norm.

        Raises:
            ValueError: If an adapter does not exist, has more than factors, or the new one exists. The model is as it
                was then.
        """
        return add_weighted_adapter(self, adapters, weights, adapter_name, combination_type, svd_rank)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # If adapter_names is passed as an argument, we inject it into the forward arguments.
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            # nothing to do
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")

        with passed_to_layers(self, self.model, adapter_names, kwargs.get("num_beams")):
            yield
