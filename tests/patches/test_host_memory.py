"""Tensors that wait in host memory: the same bits in any order of use, and memory that is never touched too early."""

from __future__ import annotations

import random
import weakref

import psutil
import pytest
import torch
from hf_turbo.patches import host_memory
from hf_turbo.patches.host_memory import STAYING, HostStore, Saved, fills_its_storage

from tests.patches.late_copies import LateCopies

pytestmark = pytest.mark.newest


class Setting:
    def __init__(self, budget: int = 2**40):
        self.copies = LateCopies()
        self.store = HostStore(lambda device: self.copies, budget)

    def backs(self) -> list[int]:
        return [int(entry.split()[1]) for entry in self.copies.log if entry.startswith("back")]


@pytest.fixture
def setting():
    setting = Setting()
    yield setting
    setting.copies.settle()


def values(count: int, size: int = 300, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, size // 3, generator=generator).to(torch.bfloat16) for _ in range(count)]


def put_all(store, tensors):
    """As a forward pass does: the caller keeps copies to compare with, not the tensors."""
    return [store.put(tensor.clone()) for tensor in tensors]


def test_backward_order_fetches_each_one_ahead(setting):
    tensors = values(6)
    saved = put_all(setting.store, tensors)
    assert setting.copies.log == [f"out {i}" for i in range(6)]
    fetched_when_asked = []
    for i in reversed(range(6)):
        before = list(setting.backs())
        assert torch.equal(setting.store.get(saved[i]), tensors[i])
        fetched_when_asked.append((i, [n for n in setting.backs() if n not in before]))
        saved.pop()
    assert fetched_when_asked == [(5, []), (4, [3]), (3, [2]), (2, [1]), (1, [0]), (0, [])]


def test_the_device_keeps_the_last_few_alone(setting):
    saved = put_all(setting.store, values(7))
    assert [s.on_device for s in saved] == [False] * (7 - STAYING) + [True] * STAYING
    # The compute stream waits for a copy only when it has had two layers' time.
    assert setting.copies.waits == [f"out {i}" for i in range(7 - STAYING)]


def test_nothing_waits_on_the_way_out_before_others_were_put(setting):
    saved = put_all(setting.store, values(STAYING))
    assert setting.copies.waits == []
    del saved


def test_copies_of_one_buffer_are_ordered_by_themselves(setting):
    """The computing streams order them too, as long as there is one; buffers are shared by all devices."""
    first = put_all(setting.store, values(4))
    setting.store.get(first[0])
    del first
    second = put_all(setting.store, values(4))
    assert setting.copies.after["back 0"] == "out 0"
    reused = [setting.copies.after[f"out {i}"] for i in range(4, 8)]
    assert sorted(reused) == ["back 0", "out 1", "out 2", "out 3"]
    del second


@pytest.mark.parametrize("seed", range(8))
def test_any_order_any_number_of_times(setting, seed):
    """retain_graph asks twice, several graphs interleave, some are dropped unasked, new ones come in between."""
    chance = random.Random(seed)
    alive: dict[int, Saved] = {}
    tensors: dict[int, torch.Tensor] = {}
    for step in range(300):
        action = chance.random()
        if action < 0.4 or not alive:
            tensors[step] = values(1, chance.choice([30, 300, 900]), step)[0]
            alive[step] = setting.store.put(tensors[step].clone())
        elif action < 0.8:
            key = chance.choice(list(alive))
            result = setting.store.get(alive[key])
            assert torch.equal(result.view(torch.int16), tensors[key].view(torch.int16))
        else:
            del alive[chance.choice(list(alive))]
        assert sum(s.fetched is not None for s in alive.values()) <= 1, "wrong guesses pile up"


def test_bits_of_nan_and_negative_zero_survive(setting):
    bits = torch.tensor([0x7FC1, 0x8000 - 0x10000, 0x7F81, 0x0001], dtype=torch.int16)
    saved = [setting.store.put(bits.clone().view(torch.bfloat16)), *put_all(setting.store, values(3))]
    assert torch.equal(setting.store.get(saved[0]).view(torch.int16), bits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "view",
    [lambda x: x, lambda x: x.permute(2, 0, 1), lambda x: x[:1].expand(4, 6, 5)],
    ids=["", "permuted", "expanded"],
)
def test_dtypes_and_strides_are_restored(setting, dtype, view):
    whole = torch.randn(4, 6, 5).to(dtype)
    tensor, expected = view(whole), view(whole.clone())
    del whole
    saved = setting.store.put(tensor)
    del tensor
    others = put_all(setting.store, values(3))
    result = setting.store.get(saved)
    assert (result.dtype, result.shape, result.stride()) == (dtype, expected.shape, expected.stride())
    assert torch.equal(result, expected)
    del others


@pytest.mark.parametrize(
    ("make", "fills"),
    [
        (lambda x: x, True),
        (lambda x: x.t(), True),
        (lambda x: x.view(-1), True),
        (lambda x: x[1:], False),
        (lambda x: x[:, :2], False),
        (lambda x: x[:1].expand(5, 4), False),
    ],
)
def test_views_of_something_larger_free_nothing(make, fills):
    assert fills_its_storage(make(torch.randn(6, 4))) is fills


def test_host_memory_is_what_one_step_needs(setting):
    """Not what all steps together need, and whatever the lengths of their batches."""
    for step in range(20):
        size = [300, 600, 1200, 480][step % 4]
        tensors = values(5, size, step)
        saved = put_all(setting.store, tensors)
        for i in reversed(range(5)):
            assert torch.equal(setting.store.get(saved.pop()), tensors[i])
        assert setting.store.bytes <= 5 * 4096
    setting.store.trim()
    assert setting.store.bytes == 0


def test_two_graphs_alive_take_twice_the_memory_and_no_more(setting):
    for _ in range(3):
        first, second = put_all(setting.store, values(4, seed=1)), put_all(setting.store, values(4, seed=2))
        assert [torch.equal(setting.store.get(s), v) for s, v in zip(first, values(4, seed=1), strict=True)] == [
            True
        ] * 4
        assert [torch.equal(setting.store.get(s), v) for s, v in zip(second, values(4, seed=2), strict=True)] == [
            True
        ] * 4
        assert setting.store.bytes == 8 * 1024
        del first, second


def test_a_dropped_graph_leaves_nothing(setting):
    saved = put_all(setting.store, values(5))
    setting.store.get(saved[3])
    setting.store.get(saved[1])
    references = [weakref.ref(s) for s in saved]
    del saved
    assert all(reference() is None for reference in references)
    setting.copies.settle()
    setting.store.trim()
    assert setting.store.bytes == 0


def test_tensors_outlive_their_store(setting):
    tensors = values(4)
    saved = put_all(setting.store, tensors)
    get = setting.store.get
    setting.store.trim()
    setting.store = HostStore(lambda device: setting.copies, 0)
    assert all(torch.equal(get(s), t) for s, t in zip(saved, tensors, strict=True))


def test_what_the_host_cannot_hold_stays_on_the_device():
    setting = Setting(budget=2 * 1024)
    tensors = values(5)
    with pytest.warns(RuntimeWarning, match="some of what is kept for backward stays on the device") as warned:
        saved = put_all(setting.store, tensors)
    assert len(warned) == 1
    assert [isinstance(s, Saved) for s in saved] == [True, True, False, False, False]
    for i in reversed(range(5)):
        assert torch.equal(setting.store.get(saved[i]), tensors[i])
    setting.copies.settle()


def test_small_buffers_make_room_for_large_ones():
    setting = Setting(budget=4 * 1024)
    small = put_all(setting.store, values(4))
    del small
    large = setting.store.put(values(1, 1800)[0])
    assert isinstance(large, Saved)
    assert setting.store.bytes == 4 * 1024
    setting.copies.settle()


def test_a_host_that_pins_no_more_is_asked_once():
    setting = Setting()
    asked = []

    def fail(size):
        asked.append(size)
        raise RuntimeError("CUDA error: out of memory")

    setting.copies.host_buffer = fail
    with pytest.warns(RuntimeWarning, match="pins no more memory"):
        saved = put_all(setting.store, values(5))
    assert len(asked) == 1
    assert all(isinstance(s, torch.Tensor) for s in saved)


def test_a_change_in_place_is_an_error_as_in_stock(setting):
    """Whether the copy was made before or after the change is chance: neither is handed out."""
    tensor = values(1)[0]
    saved = setting.store.put(tensor)
    tensor.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        setting.store.get(saved)
    others = put_all(setting.store, values(4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        setting.store.get(saved)
    del others


def test_use_on_another_stream_is_made_known_to_the_allocator(setting):
    tensors = values(5)
    saved = put_all(setting.store, tensors)
    setting.store.get(saved[3])  # fetches 2 ahead, on the stream that computes now
    setting.copies.current = "another"
    assert torch.equal(setting.store.get(saved[2]), tensors[2])
    assert setting.copies.shared == 1
    assert torch.equal(setting.store.get(saved[0]), tensors[0])
    assert setting.copies.shared == 1


def test_host_memory_of_this_machine():
    assert 0 < host_memory.available() <= psutil.virtual_memory().total


def test_a_container_has_what_its_limit_leaves_and_its_page_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(host_memory, "_GROUP", tmp_path)
    free = host_memory.available()
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 500\nactive_file 100\ninactive_file 200\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory.available() == pytest.approx(free, rel=0.2)
    (tmp_path / "memory.max").write_text("1000\n")
    assert host_memory.available() == 400
    (tmp_path / "memory.max").write_text("500\n")
    assert host_memory.available() == 0
