"""How cuBLAS adds up 16-bit products, while LoRA layers are patched."""

from __future__ import annotations

import pytest
import torch
from hf_turbo.patches import lora
from hf_turbo.patches.sums import FULL_SUMS

import hf_turbo
from hf_turbo import lifecycle

MATMUL = torch.backends.cuda.matmul
FP16, BF16 = "allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction"


def flags() -> tuple[bool, bool]:
    return getattr(MATMUL, FP16), getattr(MATMUL, BF16)


@pytest.fixture(autouse=True)
def as_torch_has_them():
    """Not by monkeypatch, which takes what `__getattr__` makes for what is not there."""
    assert flags() == (True, True)
    yield
    for flag in (FP16, BF16):
        setattr(MATMUL, flag, True)


def test_in_full_as_long_as_anyone_wants_it():
    FULL_SUMS.apply()
    FULL_SUMS.apply()
    assert flags() == (False, False)
    assert FULL_SUMS.revert()
    assert flags() == (False, False)
    assert FULL_SUMS.revert()
    assert flags() == (True, True)


def test_what_the_user_forbids_stays_forbidden():
    setattr(MATMUL, BF16, False)
    FULL_SUMS.apply()
    assert flags() == (False, False)
    assert FULL_SUMS.revert()
    assert flags() == (True, False)


def test_what_is_set_meanwhile_is_left_alone():
    FULL_SUMS.apply()
    setattr(MATMUL, FP16, True)
    assert not FULL_SUMS.revert()
    assert flags() == (True, True)


def test_one_of_two_models_goes_back_to_stock():
    peft = pytest.importorskip("peft")
    models = [torch.nn.ModuleDict({"linear": torch.nn.Linear(2, 2)}) for _ in range(2)]
    models = [peft.get_peft_model(model, peft.LoraConfig(target_modules=["linear"])) for model in models]
    for model in models:
        hf_turbo.patch_model(model, lora=True)
    activation = lifecycle._STATE.enabled
    activation._apply(models[0], "Model", "lora", lora.find(models[0]), "a reason")
    assert flags() == (False, False)
    hf_turbo.disable()
    assert flags() == (True, True)


def test_only_with_adapters():
    assert FULL_SUMS not in lora.find(torch.nn.Linear(2, 2)).patches
    peft = pytest.importorskip("peft")
    model = torch.nn.ModuleDict({"linear": torch.nn.Linear(2, 2)})
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["linear"]))
    assert FULL_SUMS in lora.find(model).patches
