"""Another optimizer in the place of the AdamW that a Trainer's arguments name: its paged form, or one chosen by name.

The Trainer asks for a class and its options of arguments that name another optimizer, when it makes one; its own stay
the script's. So do checkpoints where the paged form of the same stands in: one of torch's AdamW saves what torch's
would, and loads it, so that a run goes on with or without hf_turbo, paged or not. One that was chosen by name saves its
own states, and loads those of the others but for 8 bits in the place of more.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
import weakref
from typing import Any

import torch
from torch import nn

from .engine import Patch, is_plain
from .random_numbers import RandomStates
from .trainer import gathers_weights, method_of, step_conflict

_WRAPPED = "__bnb_optimizer_quant_state__"  # where bitsandbytes saves states, so that FSDP does not gather them
_NAMES = {"state1": "exp_avg", "state2": "exp_avg_sq"}
_USUAL_LENGTH = 1024  # to which TRL cuts rows
_FEW = 16  # rows of a dataset whose lengths are looked at

_STAND_INS: weakref.WeakKeyDictionary[Any, StandIn] = weakref.WeakKeyDictionary()


class StandIn:
    """What the states of an optimizer are saved as that is in another's place.

    Args:
        optim: what the arguments name.
        used: what is used.
        group: options of a parameter group, as the optimizer of `optim` has them; None where both save alike.
    """

    def __init__(self, optim: str, used: str, group: dict[str, Any] | None):
        self.optim, self.used, self._group = optim, used, group

    @property
    def is_less_precise(self) -> bool:
        """States of 8 bits for others, or torch's, which have the weights' dtype, for those of 32 bits."""
        return ("8bit" in self.used and "8bit" not in self.optim) or ("torch" in self.used and "32bit" in self.optim)

    def saved(self, optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        """As the optimizer of `optim` saves it, of what bitsandbytes does."""
        if self._group is None:
            return state_dict
        foreign = optimizer.defaults.keys() - self._group.keys()
        groups = [
            {**self._group, **{key: value for key, value in group.items() if key not in foreign}}
            for group in state_dict["param_groups"]
        ]
        return {"state": {key: _torch_state(one) for key, one in state_dict["state"].items()}, "param_groups": groups}

    def to_load(self, optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        """As the optimizer saves it, of what torch's AdamW or bitsandbytes' does.

        Raises:
            ValueError: states in 8 bits for others.
        """
        known = {*optimizer.defaults, "initial_lr"}.union(*optimizer.param_groups)  # schedulers have some there
        groups = [
            {**optimizer.defaults, **{key: value for key, value in group.items() if key in known}}
            for group in state_dict["param_groups"]
        ]
        if "8bit" not in self.used and any(map(_is_8bit, state_dict["state"].values())):
            raise ValueError(
                f"hf_turbo: the checkpoint has states in 8 bits, which {self.used} cannot take: resume with the optim "
                "that it was saved with"
            )
        convert = _torch_state if isinstance(optimizer, torch.optim.AdamW) else _bitsandbytes_state
        states = {key: convert(one) for key, one in state_dict["state"].items()}
        return {"state": states, "param_groups": groups}


def _is_8bit(state: dict[str, Any]) -> bool:
    state1 = _flat(state).get("state1")
    return torch.is_tensor(state1) and state1.dtype == torch.uint8


def _flat(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in {**state, **state.get(_WRAPPED, {})}.items() if name != _WRAPPED}


def _torch_state(state: dict[str, Any]) -> dict[str, Any]:
    flat = _flat(state)
    if "state1" not in flat:
        return state
    flat["step"] = torch.tensor(float(flat["step"]), dtype=torch.float32)
    return {_NAMES.get(name, name): value for name, value in flat.items()}


def _bitsandbytes_state(state: dict[str, Any]) -> dict[str, Any]:
    if "exp_avg" not in state:
        return state
    names = {value: key for key, value in _NAMES.items()}
    renamed = {names.get(name, name): value for name, value in state.items()}
    for name in _NAMES:
        renamed[name] = renamed[name].float()
    return {**renamed, "step": int(renamed["step"])}


class ChosenOptimizer(Patch):
    """Has a trainer make another optimizer; its arguments are not touched.

    Args:
        used: by the name that arguments would give.
        saved_alike: save what the optimizer of the arguments would.
    """

    id = "trainer:get_optimizer_cls_and_kwargs"

    def __init__(self, trainer: Any, used: str, saved_alike: bool):
        self._trainer, self._used = weakref.ref(trainer), used
        self._chosen = _choice(trainer, trainer.args, used)
        group, optim = None, optim_of(trainer)
        if saved_alike:
            stock_cls, stock_options = _choice(trainer, trainer.args, optim)
            if stock_cls is torch.optim.AdamW:
                group = stock_cls([torch.zeros(1)], **stock_options).param_groups[0]
                group = {key: value for key, value in group.items() if key != "params"}
        self._stand_in = StandIn(optim, used, group)

    def _choose(self, args: Any, *rest: Any) -> tuple[Any, dict[str, Any]]:
        """In the place of `Trainer.get_optimizer_cls_and_kwargs`: a search may have changed what else arguments say."""
        return _choice(self._trainer(), args, self._used)

    def apply(self) -> None:
        trainer = self._trainer()
        if trainer is not None:
            trainer.get_optimizer_cls_and_kwargs = self._choose

    def revert(self) -> bool:
        trainer = self._trainer()
        if trainer is None:
            return True
        if vars(trainer).get("get_optimizer_cls_and_kwargs") != self._choose:
            return False
        del trainer.get_optimizer_cls_and_kwargs
        return True

    def made(self, optimizer: Any) -> bool:
        """The trainer has made an optimizer; whether it is this one."""
        if _is_of(optimizer, *self._chosen):
            _STAND_INS[optimizer] = self._stand_in
        return optimizer in _STAND_INS


def stand_in_of(optimizer: Any) -> StandIn | None:
    return _STAND_INS.get(optimizer)


def optim_of(trainer: Any) -> str:
    return str(getattr(trainer.args.optim, "value", trainer.args.optim))


def is_used(trainer: Any, optimizer: Any, named: str) -> bool:
    """Whether a trainer has an optimizer of this name, or will make one by its arguments.

    Args:
        optimizer: the trainer's, without accelerate's around it; None if there is none yet.
    """
    if optimizer is not None and optimizer in _STAND_INS:
        return _same(_STAND_INS[optimizer].used, named)
    if not _same(optim_of(trainer), named) or trainer.optimizer_cls_and_kwargs is not None or _scripts_own(trainer):
        return False
    return optimizer is None or _is_of(optimizer, *_choice(trainer, trainer.args, named))


def _is_of(optimizer: Any, cls: Any, options: dict[str, Any]) -> bool:
    """Whether it was made so, but for rates."""
    bits = getattr(getattr(optimizer, "args", None), "optim_bits", None)
    return (
        isinstance(optimizer, cls)
        and getattr(optimizer, "is_paged", False) == options.get("is_paged", False)
        and bits == options.get("optim_bits", bits)
        and bool(optimizer.defaults.get("fused")) == bool(options.get("fused"))
    )


def _same(optim: str, other: str) -> bool:
    """bitsandbytes' 8 bits have two names."""
    return optim.replace("_bnb", "") == other.replace("_bnb", "")


def _choice(trainer: Any, args: Any, optim: str) -> tuple[Any, dict[str, Any]]:
    """Class and options of an optimizer of that name, by a trainer's arguments."""
    args = copy.copy(args)
    object.__setattr__(args, "optim", type(args.optim)(optim))
    cls, options = type(trainer).get_optimizer_cls_and_kwargs(args, trainer.model)
    return cls, dict(options)


def make(trainer: Any, used: str, saved_alike: bool) -> tuple[ChosenOptimizer | None, str]:
    """The patch, or why it cannot be had."""
    try:
        return ChosenOptimizer(trainer, used, saved_alike), ""
    except Exception as error:  # bitsandbytes without a library for this device, or a version that differs
        return None, f"{used} cannot be made: {type(error).__name__}: {error}"


def _scripts_own(trainer: Any) -> str | None:
    """What makes this trainer's optimizer that is no library's, or None."""
    for name in ("create_optimizer", "get_optimizer_cls_and_kwargs"):
        method = method_of(trainer, name)
        if method.__module__.partition(".")[0] not in {"transformers", "trl"}:
            return str(method.__qualname__)
    return None


def has_optimizer(trainer: Any) -> bool:
    """Whether it trains with one that is there already; where it makes its model itself it makes another."""
    return trainer.optimizer is not None and trainer.model_init is None


def conflict(trainer: Any, used: str) -> str | None:
    """Why a trainer's own choice of optimizer stands, or None."""
    if has_optimizer(trainer) or trainer.optimizer_cls_and_kwargs is not None:
        return "the script has made its optimizer"
    if "adamw" not in optim_of(trainer):
        return f"the arguments name {optim_of(trainer)}, which is no AdamW"
    own = _scripts_own(trainer)
    if own is not None:
        return f"{own} is the script's"
    if trainer.args.optim_args:
        return "optim_args is given"
    kind = gathers_weights(trainer)
    if kind is not None:
        return f"{kind} has states of its own"
    reason = step_conflict(trainer)
    if reason is not None:
        return reason
    if not is_plain(*trainer.model.parameters()):
        return "parameters are tensor subclasses"
    if "torch" not in used and importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed: pip install bitsandbytes"
    return None


def trained(model: Any) -> list[tuple[int, int, bool]]:
    """What the optimizer will have states of: elements, bytes of each, and whether it is an embedding."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return [(param.numel(), param.itemsize, id(param) in tables) for param in model.parameters() if param.requires_grad]


def bytes_elsewhere(model: Any, device: torch.device) -> int:
    """Of the weights that are not on the device yet."""
    return sum(param.nbytes for param in model.parameters() if param.device.type != device.type)


def sizes_of_pass(trainer: Any) -> tuple[int, int, int, int, int]:
    """Tokens, layers, hidden and intermediate width, and bytes of an element; zeros where the model does not say."""
    layers, hidden, intermediate = _widths(trainer.model)
    half = trainer.args.bf16 or trainer.args.fp16
    itemsize = 2 if half else next((param.itemsize for param in trainer.model.parameters()), 4)
    return _tokens(trainer), layers, hidden, intermediate, itemsize


def _widths(model: Any) -> tuple[int, int, int]:
    try:
        config = model.config
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        widths = [getattr(config, name, 0) for name in ("num_hidden_layers", "hidden_size", "intermediate_size")]
        layers, hidden, intermediate = (width if isinstance(width, int) else 0 for width in widths)
    except Exception:  # a model may be anything, with a configuration of any kind or none, and this is an estimate
        return 0, 0, 0
    return layers, hidden, intermediate


def _tokens(trainer: Any) -> int:
    """Of a micro-batch, as far as that is known before there is one."""
    length = getattr(trainer.args, "max_length", None)
    if not isinstance(length, int):
        length = _longest(trainer.train_dataset) or _USUAL_LENGTH
    return int(trainer.args.per_device_train_batch_size * length)


def _longest(dataset: Any) -> int:
    """Of the first rows of a table, 0 where that is not known.

    A dataset of the script's own may draw random numbers for its rows, or count them: no row of such a one is read.
    """
    table = getattr(sys.modules.get("datasets"), "Dataset", None)
    if table is None or type(dataset) is not table or dataset.format["type"] == "custom":
        return 0
    before = RandomStates(torch.device("cpu"))
    try:
        return max(len(dataset[i]["input_ids"]) for i in range(min(_FEW, len(dataset))))
    except Exception:  # rows may have no such column, or none of them be there, and this is an estimate
        return 0
    finally:
        before.restore()
