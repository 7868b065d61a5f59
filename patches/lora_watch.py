"""Whether a LoRA layer is still what it was found to be, at a tenth of the cost of finding out again.

Adapters come and go in training, so the question is asked at every call. Compared are the identities of all that the
answer rests on, and the emptiness of the hook dictionaries of the modules that are bypassed. A layer that is found
different is examined again from the start; a wrong "different" costs time and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Watch:
    """Takes down what a layer rests on, right after it was examined.

    Args:
        module: a LoRA layer of PEFT, or a linear layer without an adapter.
        name: of its active adapter; None where there is none.
    """

    __slots__ = (
        "_a",
        "_a_modules",
        "_active",
        "_b",
        "_b_modules",
        "_base",
        "_compute_dtype",
        "_count",
        "_dictionaries",
        "_dropout",
        "_drops",
        "_hooks",
        "_magnitude",
        "_magnitude_modules",
        "_modules",
        "_name",
        "_parameters",
        "_quant_state",
        "_scaling",
        "_state",
        "_types",
        "_variant",
    )

    def __init__(self, module: Any, name: str | None):
        self._state, self._modules, self._name = module.__dict__, module._modules, name
        self._base = base = module if name is None else module._modules["base_layer"]
        bypassed = [base]
        if name is not None:
            # A copy: the list may be changed in place. And with an adapter more, another of its names may mean one.
            active = self._state["_active_adapter"]
            self._active = active if isinstance(active, str) else list(active)
            self._scaling = self._state["scaling"][name]
            self._a_modules, self._b_modules = self._modules["lora_A"]._modules, self._modules["lora_B"]._modules
            self._a, self._b, self._count = self._a_modules[name], self._b_modules[name], len(self._a_modules)
            self._dropout = self._modules["lora_dropout"]._modules[name]
            self._drops = self._drop_state()
            bypassed += [self._a, self._b, self._dropout]
            self._variant = self._state["lora_variant"].get(name)
            if self._variant is not None:  # DoRA, which has magnitudes
                self._magnitude_modules = self._modules["lora_magnitude_vector"]._modules
                self._magnitude = self._magnitude_modules[name]
                bypassed.append(self._magnitude)
        self._types = [(each, type(each)) for each in bypassed]
        self._dictionaries = [each.__dict__ for each in bypassed]
        self._hooks = [each.__dict__[hooks] for each in bypassed for hooks in _HOOKS]
        owners = [(base, "weight"), (base, "bias")]
        if name is not None:
            owners += [(self._a, "weight"), (self._b, "weight")]
            if self._variant is not None:
                owners.append((self._magnitude, "weight"))
        self._parameters = [
            (owner._parameters, key, owner._parameters[key], _properties(owner._parameters[key]))
            for owner, key in owners
        ]
        self._quant_state = getattr(base._parameters["weight"], "quant_state", None)
        self._compute_dtype = base.__dict__.get("compute_dtype")

    def of(self, module: nn.Module) -> bool:
        """Whether this is about `module`."""
        return self._state is module.__dict__

    def is_same(self) -> bool:
        """Whether nothing has changed since."""
        name, state = self._name, self._state
        if name is not None and (
            state["_disable_adapters"]
            or state["merged_adapters"]
            or state["_active_adapter"] != self._active
            or len(self._a_modules) != self._count
            or state["lora_variant"].get(name) is not self._variant
            or not state["cast_input_dtype_enabled"]
            or state["scaling"].get(name) != self._scaling
            or self._modules["base_layer"] is not self._base
            or self._a_modules.get(name) is not self._a
            or self._b_modules.get(name) is not self._b
            or self._modules["lora_dropout"]._modules.get(name) is not self._dropout
            or self._drop_state() != self._drops
            or (self._variant is not None and not self._is_same_dora())
        ):
            return False
        if any(self._hooks) or nn.modules.module._has_any_global_hook():
            return False
        for module, cls in self._types:
            if type(module) is not cls:
                return False
        for dictionary in self._dictionaries:
            if "forward" in dictionary:
                return False
        for parameters, key, parameter, properties in self._parameters:
            if parameters[key] is not parameter or _properties(parameter) != properties:
                return False
        base = self._base
        return (
            base.__dict__.get("compute_dtype") is self._compute_dtype
            and getattr(base._parameters["weight"], "quant_state", None) is self._quant_state
        )

    def _is_same_dora(self) -> bool:
        return self._magnitude_modules.get(self._name) is self._magnitude and not self._state["ephemeral_gpu_offload"]

    def _drop_state(self) -> Any:
        dropout = self._dropout
        return type(dropout) is nn.Dropout and dropout.training and dropout.p


def _properties(parameter: torch.Tensor | None) -> tuple[torch.dtype, int, bool] | None:
    """What `.data =` and `requires_grad_` change without another parameter; every device has addresses of its own."""
    return None if parameter is None else (parameter.dtype, parameter.data_ptr(), parameter.requires_grad)
