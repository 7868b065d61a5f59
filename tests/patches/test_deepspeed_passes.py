"""What hf_turbo makes of a DeepSpeed config, without DeepSpeed; trainings with it: tests/hosts/test_deepspeed.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hf_turbo.patches import deepspeed
from hf_turbo.patches.micro_batches import Pass, foresee

from hf_turbo import TurboConfig
from hf_turbo.lifecycle import _Activation
from hf_turbo.reports import Report


def trainer(processes: int = 2, kind: str = "DEEPSPEED", **config: Any) -> Any:
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=config))
    return SimpleNamespace(
        accelerator=SimpleNamespace(distributed_type=SimpleNamespace(value=kind), state=state, num_processes=processes)
    )


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_is_understood(stage):
    off = {"device": "none"}
    zero = {"stage": stage, "overlap_comm": True, "reduce_bucket_size": "auto", "offload_optimizer": off}
    found = trainer(zero_optimization=zero)
    assert deepspeed.merging_conflict(found) is None
    assert deepspeed.needs_agreement(found)
    assert not deepspeed.needs_agreement(trainer(processes=1, zero_optimization=zero))
    assert deepspeed.needs_gradients(found) == (stage == 2)
    assert deepspeed.overwrites_gradients(found) == (stage == 3)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({}, "without ZeRO"),
        ({"zero_optimization": {"stage": 0}}, "without ZeRO"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, "zero_hpz_partition_size"),
        ({"zero_optimization": {"stage": 3}, "compile": {"deepcompile": True}}, "DeepCompile"),
    ],
)
def test_what_has_not_been_tried_is_refused(config, reason):
    assert reason in str(deepspeed.merging_conflict(trainer(**config)))


def test_other_trainers_have_nothing_of_it():
    other = trainer(kind="MULTI_GPU")
    assert deepspeed.merging_conflict(other) is None
    assert not deepspeed.needs_agreement(other)
    assert not deepspeed.needs_gradients(other)
    assert not deepspeed.overwrites_gradients(other)


def test_first_micro_batch_alone():
    activation, model = _Activation(TurboConfig(max_tokens_per_pass=100), Report()), torch.nn.Linear(1, 1)
    plan, plan_alone = (activation.passes(model, None, first_alone) for first_alone in (False, True))
    assert plan([10, 20, 30], 30, None, True) == [3]
    assert plan_alone([10, 20, 30], 30, None, True) == [1, 2]
    assert plan_alone([10], 30, None, True) == [1]
    assert plan_alone([10, 20, 30], 30, None, False) == [1, 1, 1]


def micro_batches(count: int) -> list[Any]:
    return [foresee({"input_ids": torch.arange(3)[None] + i}) for i in range(count)]


def test_every_backward_comes_to_the_anchor():
    anchor = torch.nn.Parameter(torch.ones(2))
    came = []
    anchor.register_post_accumulate_grad_hook(lambda parameter: came.append(parameter.grad.clone()))
    of = Pass(micro_batches(2), lambda gradient: None, anchor)
    of.computed(SimpleNamespace(last_hidden_state=(torch.randn(1, 6, 2) * anchor)), {})
    states = [of.hand_out(place).last_hidden_state for place in range(2)]
    states[0].sum().backward()
    assert [each.tolist() for each in came] == [[0.0, 0.0]]
    states[1].sum().backward()
    assert len(came) == 2
    assert came[1].abs().sum() > 0


def test_copies_on_a_cpu_are_recognised():
    ids, mask = torch.arange(6).view(2, 3), torch.ones(2, 3, dtype=torch.long)
    found = foresee({"input_ids": ids, "attention_mask": mask})
    copies = {"input_ids": ids.clone(), "attention_mask": mask.clone()}
    assert found.is_called_with(copies)
    assert not found.is_called_with({**copies, "input_ids": ids + 1})
    assert not found.is_called_with({**copies, "input_ids": ids.to(torch.int32)})
    mask[1, 2] = 0
    assert not found.is_called_with({"input_ids": ids, "attention_mask": mask})
    assert not found.is_called_with({"input_ids": ids, "attention_mask": mask.clone()})
