"""Backbones whose weights FSDP2 gathers layer by layer, and passes that several micro-batches share.

accelerate gathers the final norm and the head together, with tied weights the embedding, too. Of a micro-batch that is
handed its part of a shared pass only the head would run; its backward would then give the weights back before the pass
comes to its norm. So norm and embedding are called as well, with no tokens: FSDP2 counts calls, and lets go of the
group when backward is over.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

_STATE_MODULE = "torch.distributed.fsdp._fully_shard._fsdp_state"


def touch(backbone: Any, hidden_states: torch.Tensor) -> None:
    """Calls those modules of a backbone that are gathered together with modules outside of it, with no tokens.

    Args:
        hidden_states: [..., H], for their width, dtype and device.
    """
    state_of = getattr(sys.modules.get(_STATE_MODULE), "_get_module_fsdp_state", None)
    if state_of is None:
        return
    inside = set(backbone.modules())
    for module in inside - set(backbone.layers.modules()):
        state = state_of(module)
        if state is None or inside.issuperset(state._modules):
            continue
        if isinstance(module, nn.Embedding):
            module(torch.zeros(1, 0, dtype=torch.long, device=hidden_states.device))
        else:
            module(hidden_states.detach().new_zeros(1, 0, hidden_states.shape[-1]))
