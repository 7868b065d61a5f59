"""Memory that runs out in one of two processes under DDP, or in both, anywhere: the step is done again, and the same.

A bucket holds a few weights, so that some have left and others have not where a backward fails.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.hosts.test_distributed import free_port, leave, set_up, start

pytestmark = pytest.mark.newest

STEPS = 3
BUCKET = {"ddp_bucket_cap_mb": 0.004}
CHECKPOINTED = {"gradient_checkpointing": True}  # where DDP does not look for unused parameters, and sorts its buckets
TWO = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}

# trainer, its arguments, and where memory runs out: the place, the calls of it, and the ranks. Of two layers a backward
# comes to the last one first; with two micro-batches every second backward is one that averages gradients.
Case = tuple[str, dict[str, Any], list[tuple[str, set[int], set[int]]]]
CASES: list[Case] = [
    (
        "plain",
        {},
        [
            ("attention", {0}, {0}),  # the very first step, in which DDP broadcasts buffers
            ("attention backward", {1}, {1}),  # the last micro-batch, after buckets have left
            ("attention backward", {3}, {0, 1}),
            ("attention backward", {2, 3}, {1}),  # again while it is done again: checkpointing is added
            ("loss", {1}, {1}),  # after forward, when DDP waits for gradients
            ("optimizer", {2}, {0}),
        ],
    ),
    (
        "plain",
        {**TWO, **CHECKPOINTED},
        [
            ("attention backward", {3}, {1}),  # in DDP's first backward, whose order it notes
            ("attention backward", {3, 6}, {0}),
            ("loss", {3}, {0}),
        ],
    ),
    (
        "sft",
        TWO,
        [
            ("attention", {5}, {0}),
            ("attention backward", {7}, {1}),
            ("gather", {6, 13}, {1}),  # among the metrics, of which some have been gathered
            ("loss", {3}, {0, 1}),
        ],
    ),
    ("dropout", TWO, [("attention backward", {6}, {0})]),
    ("dpo", {}, [("gather", {4}, {0}), ("attention backward", {2}, {1})]),
]


def name_of(case: Case, fault: tuple[str, set[int], set[int]]) -> str:
    kind, arguments, _ = case
    place, calls, ranks = fault
    return f"{kind} {'two' if 'gradient_accumulation_steps' in arguments else 'one'}: {place} {calls} on {ranks}"


def makers() -> dict[str, Callable[..., Any]]:
    from tests.hosts import test_padding_hosts, test_retry_hosts

    plain = {name: getattr(test_padding_hosts, f"make_{name}") for name in ("plain", "sft", "dpo")}
    return {**plain, "dropout": test_retry_hosts.make_dropout}


def inject() -> Any:
    """Faults as in one process, and within the gathering of metrics and the optimizer's step."""
    from accelerate import Accelerator

    from tests.hosts.test_retry_hosts import Faults

    patch = pytest.MonkeyPatch()
    faults = Faults(patch)

    def before(owner: Any, method: str, place: str) -> None:
        stock = getattr(owner, method)

        def faulty(*args: Any, **kwargs: Any) -> Any:
            faults._fault(place)
            return stock(*args, **kwargs)

        patch.setattr(owner, method, faulty)

    before(Accelerator, "gather", "gather")
    before(torch.optim.SGD, "_init_group", "optimizer")
    return faults


def run(make: Callable[..., Any], folder: str, arguments: dict[str, Any], **options: Any) -> dict[str, Any]:
    from transformers import set_seed

    import hf_turbo

    set_seed(0)
    more = {"max_steps": STEPS, **BUCKET, **arguments}
    if make.__name__ == "make_dropout":
        del more["max_steps"]
    trainer = make(Path(folder), **more)
    with warnings.catch_warnings(), hf_turbo.session(report=False, padding=True, **options) as report:
        warnings.simplefilter("ignore")
        trainer.train()
    wrapped = trainer.model_wrapped
    assert type(wrapped).__name__ == "DistributedDataParallel"
    assert len(wrapped.reducer._get_zeros_like_grad_buckets()) > 3
    kept = ("loss", "grad_norm", "num_tokens", "mean_token_accuracy", "entropy", "rewards/margins")
    logs = {key: [log[key] for log in trainer.state.log_history if key in log] for key in kept}
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    retried = trainer.state.log_history[-2].get("turbo/retried_steps", 0)
    told = [note for note in report.notes if "out of memory" in note]
    return {"weights": weights, "logs": logs, "told": told, "retried": retried}


def survivors(rank: int, port: int, folder: str) -> None:
    set_up(rank, port)
    from tests.training import fused_head_on_cpu

    faults, results = inject(), {}
    collectives = {name: value for name, value in vars(dist).items() if callable(value)}
    with fused_head_on_cpu():
        for case in CASES:
            kind, arguments, wanted = case
            make = makers()[kind]
            faults.fail_at = {}
            without = run(make, folder, arguments, merging=False)
            for fault in wanted:
                place, calls, ranks = fault
                faults.calls.clear()
                faults.fail_at = {place: calls} if rank in ranks else {}
                results[name_of(case, fault)] = (without, run(make, folder, arguments, merging=False))
        faults.calls.clear()
        faults.fail_at = {"attention backward": {2}} if rank == 1 else {}
        shared = [run(makers()["sft"], folder, TWO), (faults.fail_at.clear(), run(makers()["sft"], folder, TWO))[1]]
    changed = [name for name, value in collectives.items() if vars(dist)[name] is not value]
    torch.save({"results": results, "changed": changed, "shared": shared}, f"{folder}/rank{rank}.pt")
    leave()


@pytest.fixture(scope="module")
def survived(tmp_path_factory):
    return start(survivors, tmp_path_factory.mktemp("survivors"))


@pytest.mark.parametrize("name", [name_of(case, fault) for case in CASES for fault in case[2]])
def test_the_same_bits_on_both_ranks(name, survived):
    wanted = next(fault for case in CASES for fault in case[2] if name_of(case, fault) == name)
    for rank, ranks in enumerate(survived):
        without, faulty = ranks["results"][name]
        assert without["weights"].keys() == faulty["weights"].keys()
        for weight, value in without["weights"].items():
            assert torch.equal(value, faulty["weights"][weight]), weight
            assert torch.equal(value, survived[1 - rank]["results"][name][1]["weights"][weight]), weight
        assert without["logs"] == faulty["logs"]
        assert without["told"] == []
        # Every rank's report names those that ran out.
        assert {told.split("rank ")[1][0] for told in faulty["told"]} == {str(each) for each in wanted[2]}
        assert faulty["retried"] >= 1


def test_shared_passes(survived):
    """A pass of two micro-batches is done again as two: the sums are others, the gradient is not."""
    for rank, ranks in enumerate(survived):
        faulty, without = ranks["shared"]
        assert faulty["told"]
        assert not without["told"]
        for weight, value in without["weights"].items():
            torch.testing.assert_close(faulty["weights"][weight], value)
            assert torch.equal(faulty["weights"][weight], survived[1 - rank]["shared"][0]["weights"][weight]), weight


def test_nothing_of_torch_distributed_stays_patched(survived):
    assert [ranks["changed"] for ranks in survived] == [[], []]


# ------------------------------------------------------------------------------------------------ the end of one


def ending(rank: int, port: int, folder: str, error: type[Exception]) -> None:
    """Rank 1 fails in every layer from step 2 on; each rank leaves the error that it ends with."""
    set_up(rank, port)
    from hf_turbo.patches import varlen

    stock, calls = varlen.varlen_attention, []

    def faulty(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if rank == 1 and len(calls) > 2:
            raise error("CUDA out of memory. By intent")
        return stock(*args, **kwargs)

    varlen.varlen_attention = faulty
    ended = None
    try:
        run(makers()["plain"], folder, {"save_strategy": "steps", "save_steps": 1})
    except Exception as caught:
        ended = caught
    notes = "".join(getattr(ended, "__notes__", ()))
    torch.save({"error": type(ended).__name__, "text": str(ended), "notes": notes}, f"{folder}/rank{rank}.pt")
    os._exit(0)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, ValueError])
def test_what_never_goes_away_ends_on_both_ranks(error, tmp_path):
    """As soon as the one that failed has gone; and what was saved is whole."""
    context = mp.spawn(ending, args=(free_port(), str(tmp_path), error), nprocs=2, join=False)
    assert context.join(timeout=90) or context.join(timeout=90), "it hangs"
    other, failed = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert failed["error"] == error.__name__
    assert other["error"] not in ("NoneType", error.__name__)
    if error is torch.OutOfMemoryError:
        assert "nothing is left that would take less" in failed["text"]
        assert "rank 1 had ended: CUDA out of memory. By intent hf_turbo: memory ran out in" in other["notes"]
    else:
        assert "hf_turbo" not in failed["text"] + other["notes"]
    assert {each.name for each in tmp_path.glob("checkpoint-*")} == {"checkpoint-1"}
    assert (tmp_path / "checkpoint-1" / "trainer_state.json").exists()
