"""torch.compile and dispatch modes (selective checkpointing, profilers) see the patched model's ops as ops."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import hf_turbo
from tests.models import batch, loss_and_gradients, tiny_model


@pytest.mark.newest
def test_compiled_model_trains_as_stock():
    model, inputs = tiny_model("llama"), batch()
    expected_loss, expected = loss_and_gradients(model, inputs)
    expected = {name: gradient.clone() for name, gradient in expected.items()}
    hf_turbo.patch_model(model)
    torch._dynamo.reset()
    model.zero_grad()
    loss = torch.compile(model, backend="aot_eager")(**inputs).loss
    loss.backward()
    torch.testing.assert_close(loss, expected_loss)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


@pytest.mark.newest
def test_the_graph_breaks_at_the_loss_and_not_before():
    """The number of labelled rows is data; everything up to the head is one graph."""
    model = tiny_model("llama")
    hf_turbo.patch_model(model)
    torch._dynamo.reset()
    explanation = torch._dynamo.explain(model)(**batch())
    reasons = [str(reason.reason) for reason in explanation.break_reasons]
    assert "linear_cross_entropy" in reasons[0], "the first break"
    assert all("linear_cross_entropy" in reason or "in_forward_context" in reason for reason in reasons)


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func).rpartition(".")[0])
        return func(*args, **(kwargs or {}))


def test_dispatch_modes_see_the_ops():
    model = tiny_model("llama")
    hf_turbo.patch_model(model)
    with Recorder() as recorder:
        loss_and_gradients(model, batch())
    ops = {"rms_norm", "rms_norm_backward", "glu", "glu_backward_keep_h", "rope", "head_statistics_"}
    assert {f"hf_turbo.{op}" for op in ops} <= recorder.names


def test_selective_checkpointing_can_save_an_op():
    """A policy that keeps the norm's output does not compute it again."""
    norm = tiny_model("llama").model.norm
    hf_turbo.patch_model(norm)
    op, calls = torch.ops.hf_turbo.rms_norm.default, []

    def policy(context, func, *args, **kwargs):
        if func is op:
            calls.append(context.is_recompute)
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    x = torch.randn(5, 48, requires_grad=True)
    y = checkpoint(
        lambda x: norm(x).sin(),
        x,
        use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(policy),
    )
    (gradient,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(norm(x).sin().sum(), x)
    torch.testing.assert_close(gradient, expected)
    assert calls == [False], "seen in forward, and not run again in backward"
