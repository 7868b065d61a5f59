"""What the host knows of batches that were sent, and of masks without zeros."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import data_loader
from hf_turbo.patches import dense_masks, engine, host_copies, labelled_rows, micro_batches, prefetch
from transformers import BatchEncoding, Trainer, TrainingArguments

import hf_turbo
from tests.models import VOCABULARY, tiny_model
from tests.training import arguments, padded_rows


@pytest.fixture
def noting(monkeypatch) -> Iterator[None]:
    """As within a training that fetches batches that are known."""
    patch = host_copies.patch()
    monkeypatch.setattr(prefetch._HERE, "watching", SimpleNamespace(knows_batches=True))
    engine._SWITCH.depth += 1
    patch.apply()
    yield
    patch.revert()
    engine._SWITCH.depth -= 1


def batch() -> dict[str, torch.Tensor]:
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    ids = torch.arange(8).view(2, 4) + 3
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask == 1, -100)}


def test_what_was_sent_is_known(noting):
    """To a device that cannot be read."""
    made = batch()
    sent = data_loader.send_to_device(made, "meta")
    assert torch.equal(host_copies.of(sent["attention_mask"]), made["attention_mask"])
    assert host_copies.known(sent["input_ids"]) is None
    seen = micro_batches.foresee({name: each for name, each in sent.items() if name != "labels"})
    assert seen.lengths == [3, 4]
    assert not micro_batches.labels_on_padding(sent)
    made["labels"].fill_(7)  # by a collator that fills the same tensors anew
    assert host_copies.known(sent["labels"])[0].tolist() == [3, 4, 5, -100]


def test_what_was_written_to_is_read(noting):
    sent = data_loader.send_to_device(batch(), "meta")
    sent["labels"].zero_()
    assert host_copies.known(sent["labels"]) is None
    assert host_copies.known(sent["attention_mask"]) is not None


def test_nothing_is_kept(noting):
    sent = data_loader.send_to_device(batch(), "meta")
    assert len(host_copies._COPIES) >= 2
    before = len(host_copies._COPIES)
    del sent
    gc.collect()
    assert len(host_copies._COPIES) == before - 2


@pytest.mark.parametrize("watching", [None, SimpleNamespace(knows_batches=False)])
def test_nothing_is_noted_of_batches_that_are_not_known(noting, monkeypatch, watching):
    """On other ranks than the first, accelerate's dispatcher sends tensors that it fills afterwards."""
    monkeypatch.setattr(prefetch._HERE, "watching", watching)
    sent = data_loader.send_to_device(batch(), "meta")
    assert host_copies.known(sent["labels"]) is None


@pytest.mark.parametrize("value", [None, [torch.ones(2)], {"labels": "text"}, {"labels": torch.ones(2, 2)}])
def test_any_batch_can_be_sent(noting, value):
    sent = data_loader.send_to_device(value, "cpu")
    assert type(sent) is type(value)


def test_batches_that_send_what_they_hold(noting):
    made = BatchEncoding(batch())
    sent = data_loader.send_to_device(made, "meta")
    assert sent is made
    assert host_copies.known(sent["attention_mask"]).tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("knows", [True, False, None])
@pytest.mark.parametrize("pinned", [True, False])
def test_nobody_waits_for_pinned_tensors_of_known_batches(noting, monkeypatch, knows, pinned):
    """Whatever else accelerate is told stays."""
    asked = []
    send = host_copies._make_send(lambda tensor, *args, **kwargs: asked.append(kwargs) or tensor)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: pinned)
    training = None if knows is None else SimpleNamespace(knows_batches=knows)
    monkeypatch.setattr(prefetch._HERE, "watching", training)
    send({**batch(), "text": "a"}, "meta", non_blocking=False, skip_keys=["x"])
    send(batch(), "meta")
    send([torch.ones(2)], "meta", non_blocking=False)
    assert asked == [{"non_blocking": knows is True and pinned, "skip_keys": ["x"]}, {}, {"non_blocking": False}]


def test_labelled_rows_of_what_is_known(noting, monkeypatch):
    """As of a tensor that is read."""
    monkeypatch.setattr(labelled_rows, "_PATCHED", {object()})
    monkeypatch.setattr(labelled_rows, "passes_labelled_rows_only", lambda device: True)
    labels = batch()["labels"]
    sent = labels.clone()
    copy = sent.clone()
    labelled_rows.note([{"labels": sent}])
    monkeypatch.setattr(host_copies, "known", lambda tensor: labels if tensor is copy else None)
    labelled_rows.note([{"labels": copy}])
    for one, other in zip(labelled_rows._noted(sent)[2:], labelled_rows._noted(copy)[2:], strict=True):
        assert torch.equal(one, other)
    places, targets = labelled_rows._noted(copy)[2:]
    assert places.tolist() == [0, 1, 4, 5, 6]
    assert targets.tolist() == [4, 5, 8, 9, 10]


# ---------------------------------------------------------------------------------------------------------- dense masks


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_a_dense_mask_is_what_it_stands_for(dtype):
    plain = torch.ones(2, 3, dtype=dtype)
    mask = dense_masks.dense(plain)
    assert mask.data_ptr() == plain.data_ptr()
    assert bool(mask.to(device="cpu", dtype=torch.bool).all())
    assert bool(mask.bool().sum() == 6)
    for result in (mask[:, 1:], mask + 1, mask.sum(-1), mask == 0, mask.to(torch.bool) & mask.bool()):
        assert type(result) is torch.Tensor
    assert torch.equal(mask.sum(-1), plain.sum(-1))
    assert type(pickle.loads(pickle.dumps(mask))) is torch.Tensor


def test_a_dense_mask_that_is_written_to_is_looked_at():
    mask = dense_masks.dense(torch.ones(2, 3, dtype=torch.bool))
    later = mask.to(torch.bool)
    mask[:, 0] = False
    assert not bool(mask.all())
    assert not bool(mask.bool().all())
    assert not bool(later.all())  # the same memory
    assert int(mask.sum()) == 4
    copied = copy.deepcopy(dense_masks.dense(torch.ones(2, 3)))
    assert type(copied) is torch.Tensor
    assert torch.equal(copied, torch.ones(2, 3))


def test_a_dense_mask_answers_without_its_values():
    """Of a device that cannot be asked."""
    mask = dense_masks.dense(torch.ones(2, 3, dtype=torch.int64, device="meta"))
    assert bool(mask.to(dtype=torch.bool).all())
    assert bool(mask.to(dtype=torch.bool).sum() == 6)


@pytest.mark.parametrize(
    ("family", "attention"),
    [("llama", "sdpa"), ("llama", "eager"), ("mistral", "sdpa"), ("gemma2", "eager"), ("gemma3", "sdpa")],
)
def test_models_compute_the_same_with_one(family, attention):
    """Windows of fewer tokens than rows have, too, for which a mask is made."""
    model = tiny_model(family)
    model.set_attn_implementation(attention)
    ids = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    expected = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(model(input_ids=ids, attention_mask=dense_masks.dense(mask)).logits, expected)


class Dense(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = [3 + (index * 7 + place) % 50 for place in range(16)]
        return {"input_ids": ids, "attention_mask": [1] * 16, "labels": ids}


@pytest.mark.parametrize("rows", ["dense", "padded"])
def test_only_masks_without_padding_are_told_to_be_dense(tmp_path: Path, monkeypatch, rows: str):
    told, dense = [], dense_masks.dense
    monkeypatch.setattr(dense_masks, "dense", lambda mask: told.append(mask.shape) or dense(mask))
    data = Dense() if rows == "dense" else padded_rows(0, 16)
    trainer = Trainer(tiny_model("llama"), TrainingArguments(**arguments(tmp_path, max_steps=2)), train_dataset=data)
    with hf_turbo.session(report=False, padding=True):
        trainer.train()
    assert len(told) >= 2 if rows == "dense" else not told
