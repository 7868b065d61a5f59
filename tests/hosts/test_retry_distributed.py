"""Memory that runs out in one of two processes under DDP, or in both, anywhere: the step is done again, no bit changes.

A bucket holds a few weights, so that some have left and others have not where a backward fails.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.hosts.test_distributed import leave, set_up, start, start_ranks

pytestmark = [pytest.mark.newest, pytest.mark.xdist_group("retry_distributed")]

BUCKET = {"ddp_bucket_cap_mb": 0.004, "ddp_timeout": 120}
CHECKPOINTED = {"gradient_checkpointing": True}  # where DDP does not look for unused parameters, and sorts its buckets
TWO = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}

# A trainer, its arguments, and where memory runs out on each rank: places, and which of their calls. Of two layers a
# backward comes to the last one first; with two micro-batches every second backward is one that averages gradients.
Faults = tuple[dict[str, set[int]], dict[str, set[int]]]
CASES: dict[str, tuple[str, dict[str, Any], Faults]] = {
    # The very first step, in which DDP broadcasts buffers; after buckets have left; when DDP waits for gradients.
    "in turn": ("plain", {}, ({"attention": {0}, "optimizer": {4}}, {"attention backward": {3}, "loss": {3}})),
    # Again while it is done again: checkpointing is added.
    "both": ("plain", {}, ({"attention backward": {2, 3}}, {"attention backward": {3}})),
    # In DDP's first backward, whose order it notes, and in a later one.
    "first": ("plain", CHECKPOINTED, ({"attention backward": {1, 5}}, {"loss": {1}})),
    # Among metrics, of which some have been gathered.
    "metrics": ("sft", TWO, ({"attention backward": {5}, "loss": {5}}, {"gather": {6, 13}, "loss": {7}})),
    "dropout": ("dropout", TWO, ({"attention backward": {6}}, {})),
    "pairs": ("dpo", {}, ({"gather": {4}}, {"attention backward": {2}})),
    # Behind the forward with gradients the loss asks the wrapped model for more without: DDP counts all the same.
    "teacher": ("teacher", {"ddp_broadcast_buffers": False}, ({}, {"attention backward": {3}})),
}


def makers() -> dict[str, Callable[..., Any]]:
    from tests.hosts import test_padding_hosts, test_retry_hosts

    plain = {name: getattr(test_padding_hosts, f"make_{name}") for name in ("plain", "sft", "dpo")}
    return {**plain, "dropout": test_retry_hosts.make_dropout, "teacher": make_teacher}


def make_teacher(folder: Path, **more: Any) -> Any:
    """A loss that calls the model twice, the second time without gradients."""
    from tests.hosts.test_padding_hosts import make_plain

    trainer = make_plain(folder, **more)
    stock = type(trainer).compute_loss

    class Held(type(trainer)):
        def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
            loss = stock(self, model, inputs, **kwargs)
            with torch.no_grad():
                held = model(**inputs).loss
            return loss * (1 + held)

    trainer.__class__ = Held
    return trainer


def inject() -> Any:
    """Faults as in one process, and within the gathering of metrics and the optimizer's step."""
    from accelerate import Accelerator

    from tests.hosts import test_retry_hosts

    patch = pytest.MonkeyPatch()
    faults = test_retry_hosts.Faults(patch)

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
    more = {"max_steps": 3, **BUCKET, **arguments}
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


def survivors(rank: int, port: int, folder: str, more: dict[str, Any], names: list[str]) -> None:
    set_up(rank, port)
    from tests.training import fused_head_on_cpu

    faults, results, known = inject(), {}, {}
    collectives = {name: value for name, value in vars(dist).items() if callable(value)}

    def train(kind: str, arguments: dict[str, Any], wanted: dict[str, set[int]], **options: Any) -> dict[str, Any]:
        faults.calls.clear()
        faults.fail_at = wanted
        result = run(makers()[kind], folder, {**arguments, **more}, **options)
        return {**result, "failed": all(faults.calls.get(place, -1) >= max(calls) for place, calls in wanted.items())}

    with fused_head_on_cpu():
        for name in names:
            kind, arguments, wanted = CASES[name]
            training = f"{kind} {arguments}"
            if training not in known:
                known[training] = train(kind, arguments, {}, merging=False)
            results[name] = known[training], train(kind, arguments, wanted[rank], merging=False)
        wanted = {"attention backward": {2}} if rank == 1 else {}
        results["shared"] = train("sft", TWO, {}), train("sft", TWO, wanted)
    changed = [name for name, value in collectives.items() if vars(dist)[name] is not value]
    torch.save({"results": results, "changed": changed}, f"{folder}/rank{rank}.pt")
    leave()


@pytest.fixture(scope="module")
def survived(tmp_path_factory):
    return start(survivors, tmp_path_factory.mktemp("survivors"), {}, list(CASES))


def assert_survived(name: str, ranks: list[Any], compare: Callable[..., None]) -> None:
    wanted = CASES[name][2] if name in CASES else ({}, {"attention backward": {2}})
    others = ranks[1]["results"][name][1]["weights"]
    for result in ranks:
        without, faulty = result["results"][name]
        assert faulty["failed"]
        assert without["weights"].keys() == faulty["weights"].keys()
        for weight, value in without["weights"].items():
            compare(faulty["weights"][weight], value, msg=weight)
            assert torch.equal(faulty["weights"][weight].cpu(), others[weight].cpu()), f"{weight}: ranks differ"
        for log, values in without["logs"].items():
            compare(torch.tensor(faulty["logs"][log]), torch.tensor(values), msg=log)
        assert without["told"] == []
        # Every rank's report names those that ran out.
        told = {note.split("rank ")[1][0] for note in faulty["told"]}
        assert told == {str(rank) for rank, faults in enumerate(wanted) if faults}
        assert faulty["retried"] >= 1


def equal(a: torch.Tensor, b: torch.Tensor, msg: str) -> None:
    assert torch.equal(a, b), msg


@pytest.mark.parametrize("name", CASES)
def test_the_same_bits_on_both_ranks(name, survived):
    assert_survived(name, survived, equal)


def test_shared_passes(survived):
    """A pass of two micro-batches is done again as two: the sums are others, the gradient is not."""
    assert_survived("shared", survived, torch.testing.assert_close)


def test_nothing_of_torch_distributed_stays_patched(survived):
    assert [result["changed"] for result in survived] == [[], []]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus(tmp_path):
    """NCCL's collectives are waited for by the devices, and not by the processes."""
    names = ["in turn", "first", "metrics", "pairs"]
    ranks = start(survivors, tmp_path, {"use_cpu": False}, names)
    for name in names:
        assert_survived(name, ranks, torch.testing.assert_close)


# ------------------------------------------------------------------------------------------------ the end of one


def ending(rank: int, port: int, folder: str, error: type[Exception]) -> None:
    """Rank 1 fails in every layer from step 2 on; each rank leaves the error that it ends with."""
    set_up(rank, port)
    from hf_turbo.patches import varlen
    from transformers import Trainer, TrainingArguments

    import hf_turbo
    from tests.models import batch, tiny_model

    stock, calls = varlen.varlen_attention, []

    def faulty(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if rank == 1 and len(calls) > 2:
            raise error("CUDA out of memory. By intent")
        return stock(*args, **kwargs)

    varlen.varlen_attention = faulty
    rows = batch(rows=8)
    rows = [{name: value[i] for name, value in rows.items()} for i in range(8)]
    saving = {
        "save_strategy": "steps",
        "save_steps": 1,
        "ddp_timeout": 120,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(folder, max_steps=3, per_device_train_batch_size=2, ddp_backend="gloo", **saving)
    ended = None
    try:
        with hf_turbo.session(report=False, padding=True):
            Trainer(tiny_model("llama"), arguments, train_dataset=rows).train()
    except Exception as caught:
        ended = caught
    notes = "".join(getattr(ended, "__notes__", ()))
    torch.save({"error": type(ended).__name__, "text": str(ended), "notes": notes}, f"{folder}/rank{rank}.pt")
    os._exit(0)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, ValueError])
def test_what_never_goes_away_ends_on_both_ranks(error, tmp_path):
    """As soon as the one that failed has gone; and what was saved is whole."""
    context = start_ranks(ending, str(tmp_path), error)
    assert context.join(timeout=120) or context.join(timeout=60), "it hangs"
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


# ------------------------------------------------------------------------------------------------ sharded weights


def sharded(**plugins: Any) -> Any:
    args = SimpleNamespace(gradient_checkpointing=False, optim="adamw_torch", per_device_train_batch_size=2)
    return SimpleNamespace(args=args, model=None, accelerator=SimpleNamespace(state=SimpleNamespace(**plugins)))


def test_advice_names_settings_that_are_not_made_yet():
    from hf_turbo.patches.advice import advice

    fsdp = {"reshard_after_forward": False, "activation_checkpointing": True, "cpu_offload": None}
    told = advice(sharded(fsdp_plugin=SimpleNamespace(**fsdp)))
    assert "in this order: fsdp_reshard_after_forward: true; fsdp_offload_params: true. What" in told
    zero = {"zero_stage": 3, "offload_optimizer_device": "cpu", "offload_param_device": "none"}
    told = advice(sharded(deepspeed_plugin=SimpleNamespace(**zero)))
    assert "in this order: offload_param_device: cpu. What" in told
    assert "accelerate config" not in advice(sharded())
