"""Two processes over gloo: Trainer under DDP, and FSDP2 with accelerate's grouping, stock and turbo.

FSDP2 is applied by hand (decoder layers; embeddings; final norm and head together; the rest), as accelerate offers it
on accelerators only. Every check is made in the workers' results, so that a failure shows in the parent with numbers.

The rule is that of test_training_curves.py: turbo's distance from stock is at most 3 times that of a stock run from
weights that are all off by one unit roundoff, plus one unit in the last place.
"""

from __future__ import annotations

import gc
import itertools
import os
import socket
from multiprocessing import set_forkserver_preload
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

FACTOR = 3
EPS = torch.finfo(torch.float32).eps
STEPS, SHARED_STEPS = 8, 4


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_ranks(worker: Any, *args: Any) -> Any:
    """Forked from a process that has all host libraries imported, which takes as long as many a test."""
    set_forkserver_preload(["tests.training"])
    return mp.start_processes(worker, (free_port(), *args), nprocs=2, join=False, start_method="forkserver")


def start(worker: Any, folder: Path, *args: Any) -> list[Any]:
    """Runs the worker as two ranks; returns what they left."""
    context = start_ranks(worker, str(folder), *args)
    while not context.join():
        pass
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def set_up(rank: int, port: int) -> None:
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()}, MASTER_ADDR="127.0.0.1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    import tests.training  # noqa: F401, with all host libraries

    gc.freeze()  # as tests/conftest.py


def leave() -> None:
    """Ends a rank once all are done, without destructors: that of gloo's process group, called with Python's lock held,
    may wait for a thread which wants that lock to let go of its last tensors (torch 2.13; pytorch/pytorch#179291).
    """
    dist.barrier()
    os._exit(0)


def assert_no_drift(results: dict[str, dict[str, torch.Tensor]], what: str) -> None:
    """The rule, for each named tensor of the runs called stock, perturbed and turbo."""
    failures = []
    assert results["stock"].keys() == results["turbo"].keys()
    for name, stock in results["stock"].items():
        stock = stock.double()
        turbo_distance = (results["turbo"][name].double() - stock).norm().item()
        noise = (results["perturbed"][name].double() - stock).norm().item()
        if not turbo_distance <= FACTOR * noise + EPS * stock.norm().item():
            failures.append(f"{name}: {turbo_distance:.3e} from stock, perturbed stock {noise:.3e}")
    assert not failures, "\n".join([what, *failures])


# ------------------------------------------------------------------------------------------------ DDP


def ddp_worker(rank: int, port: int, folder: str) -> None:
    set_up(rank, port)
    from transformers import Trainer, TrainingArguments, set_seed

    import hf_turbo
    from tests.models import batch, switched_off, tiny_model
    from tests.training import perturb

    # Rows of different numbers of labels: the ranks must agree on the denominator.
    rows = []
    for i in range(32):
        row = {name: value[0] for name, value in batch(rows=1, length=14, seed=i, masked=False).items()}
        row["labels"][: i % 11] = -100
        row["attention_mask"][14 - i % 3 :], row["labels"][14 - i % 3 :] = 0, -100
        rows.append(row)
    runs, reports, notes = {}, {}, []
    autocast = {**switched_off("autocast"), "report": False}
    options = {"turbo": {"report": False, "max_tokens_per_pass": 4096}, "autocast": autocast}
    for name in ("stock", "perturbed", "turbo", "after", "stock autocast", "autocast"):
        set_seed(0)
        model = tiny_model("qwen3")
        if name == "perturbed":
            perturb(model)
        arguments = TrainingArguments(
            output_dir=f"{folder}/{name}",
            max_steps=3 if "autocast" in name else STEPS,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=0.05,
            optim="sgd",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            ddp_backend="gloo",
            bf16="autocast" in name,
        )
        trainer = Trainer(model, arguments, train_dataset=rows)
        if name in options:
            hf_turbo.enable(**options[name])
        trainer.train()
        if name in options:
            reports[name] = {row.role: (row.found, row.patched) for row in hf_turbo.report().rows}
            notes += hf_turbo.report().notes if name == "turbo" else []
            hf_turbo.disable()
        logs = trainer.state.log_history
        runs[name] = {key: torch.tensor([log[key] for log in logs if key in log]) for key in ("loss", "grad_norm")}
        runs[name] |= {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    torch.save({"runs": runs, "report": reports, "notes": notes}, f"{folder}/rank{rank}.pt")
    leave()


@pytest.mark.newest
def test_trainer_under_ddp(tmp_path):
    ranks = start(ddp_worker, tmp_path)
    for rank, result in enumerate(ranks):
        assert result["report"]["autocast"]["autocast"] == (14, 14)
        assert result["report"]["turbo"] == {
            "norms": (9, 9),
            "mlp": (2, 2),
            "layers": (2, 2),
            "rope": (2, 2),
            "loss": (1, 1),
            "padding": (1, 1),
            "merging": (1, 1),
            "optimizer": (1, 0),  # on a CPU torch's is as fast
        }
        assert len(result["runs"]["stock"]["loss"]) == STEPS
        assert any(f"{STEPS} passes instead of {2 * STEPS}" in note for note in result["notes"]), result["notes"]
        assert_no_drift(result["runs"], f"rank {rank}")
        for name, value in result["runs"]["stock"].items():
            assert torch.equal(result["runs"]["after"][name], value), f"{name}: not stock after disable()"
        for name, value in result["runs"]["stock autocast"].items():
            assert torch.equal(result["runs"]["autocast"][name], value), f"{name} under autocast"
    for name, value in ranks[0]["runs"]["turbo"].items():
        assert torch.equal(ranks[1]["runs"]["turbo"][name], value), f"{name}: ranks differ"


# ------------------------------------------------------------------------------------------------ FSDP2


def shard(model: Any) -> None:
    """As `accelerate.utils.fsdp_utils.fsdp2_prepare_model`."""
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    tail = [model.model.norm, model.lm_head]
    if model.lm_head.weight is model.model.embed_tokens.weight:
        tail.insert(1, model.model.embed_tokens)
    else:
        fully_shard(model.model.embed_tokens, mesh=mesh)
    fully_shard(tail, mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)


def train_sharded(model: Any, rank: int, steps: int) -> dict[str, torch.Tensor]:
    """Losses, the gradients of the first step and the final weights, gathered."""
    from tests.models import batch

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses, gradients = [], {}
    for step in range(steps):
        loss = model(**batch(seed=2 * step + rank)).loss
        loss.backward()
        losses.append(loss.detach())
        if step == 0:
            gradients = {f"gradient of {n}": p.grad.full_tensor().clone() for n, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: parameter.full_tensor().detach().clone() for name, parameter in model.named_parameters()}
    return {"loss": torch.stack(losses), **gradients, **weights}


def fsdp_worker(rank: int, port: int, folder: str) -> None:
    set_up(rank, port)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    from hf_turbo.patches import decoder_layers, head, mlp, norms, rope

    import hf_turbo
    from tests.models import tiny_model
    from tests.training import perturb

    runs, calls = {}, {}
    for name in ("stock", "perturbed", "turbo"):
        model = tiny_model("qwen3")
        if name == "perturbed":
            perturb(model)
        if name == "turbo":
            for module, op in (
                (norms, "rms_norm"),
                (decoder_layers, "add_rms_norm"),
                (mlp, "glu_linear"),
                (rope, "qk_norm_rope"),
                (head, "linear_cross_entropy"),
            ):
                count_calls(module, op, calls)
            hf_turbo.patch_model(model)
        shard(model)
        runs[name] = train_sharded(model, rank, STEPS)
    counted = dict(calls)

    # The model that was sharded while patched, against one that never was.
    hf_turbo.disable()
    after = {"turbo": train_sharded(model, rank, 2)}
    twin = tiny_model("qwen3")
    twin.load_state_dict(
        {name: value for name, value in runs["turbo"].items() if name in dict(twin.named_parameters())}
    )
    shard(twin)
    after["stock"] = train_sharded(twin, rank, 2)
    called_after = {op: calls[op] - counted[op] for op in calls}

    # Sharded first, patched afterwards: nothing is known to work, so all that holds parameters stays stock.
    late = tiny_model("qwen3")
    shard(late)
    hf_turbo.patch_model(late)
    runs["late"] = train_sharded(late, rank, STEPS)
    reasons = {row.role: (row.patched, row.reason) for row in hf_turbo.report().rows}
    hf_turbo.disable()
    torch.save(
        {"runs": runs, "calls": counted, "after": after, "called_after": called_after, "late": reasons},
        f"{folder}/rank{rank}.pt",
    )
    leave()


def count_calls(module: Any, name: str, calls: dict[str, int]) -> None:
    op = getattr(module, name)
    calls[name] = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        return op(*args, **kwargs)

    setattr(module, name, counted)


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory):
    return start(fsdp_worker, tmp_path_factory.mktemp("fsdp"))


@pytest.mark.newest
@pytest.mark.xdist_group("fsdp")
def test_fsdp2_runs_fused_and_right(fsdp):
    for rank, result in enumerate(fsdp):
        # Of the norms of two layers and the last one, those after a residual addition are one pass with it, and those
        # of queries and keys with the rotary embedding.
        assert (result["calls"]["rms_norm"], result["calls"]["add_rms_norm"]) == (STEPS, 4 * STEPS)
        assert result["calls"]["qk_norm_rope"] == 2 * STEPS
        assert result["calls"]["glu_linear"] > 0
        assert result["calls"]["linear_cross_entropy"] == STEPS
        assert_no_drift({name: result["runs"][name] for name in ("stock", "perturbed", "turbo")}, f"rank {rank}")


@pytest.mark.newest
@pytest.mark.xdist_group("fsdp")
def test_fsdp2_after_disable_is_stock(fsdp):
    """FSDP has made classes of its own out of ours, which cannot be put back; the switch alone makes them stock."""
    for result in fsdp:
        assert set(result["called_after"].values()) == {0}
        for name, value in result["after"]["stock"].items():
            assert torch.equal(result["after"]["turbo"][name], value), name


@pytest.mark.newest
@pytest.mark.xdist_group("fsdp")
def test_model_that_is_sharded_already(fsdp):
    """Patched or not with a reason, and right either way."""
    for rank, result in enumerate(fsdp):
        assert all(patched or reason for patched, reason in result["late"].values())
        runs = {**{name: result["runs"][name] for name in ("stock", "perturbed")}, "turbo": result["runs"]["late"]}
        assert_no_drift(runs, f"rank {rank}")


# ------------------------------------------------------------------------------------------------ FSDP2, shared passes


def micro_batches(rank: int, step: int) -> list[dict[str, torch.Tensor]]:
    """Rows of other lengths on each rank, so that each would share passes in its own way."""
    from tests.models import batch

    return [batch(length=8 + (7 * step + 5 * i + 11 * rank * i) % 17, seed=10 * step + 2 * i + rank) for i in range(4)]


def accumulate_sharded(model: Any, rank: int, announce: Any) -> dict[str, torch.Tensor]:
    """Losses, gradient norms and the final weights, four micro-batches a step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    logs = {"loss": [], "grad_norm": []}
    for step in range(SHARED_STEPS):
        batches = micro_batches(rank, step)
        announce(batches)
        for i, each in enumerate(batches):
            model.set_requires_gradient_sync(i == len(batches) - 1)
            loss = model(**each).loss / len(batches)
            loss.backward()
            logs["loss"].append(loss.detach())
        norms = [p.grad.full_tensor().norm() for p in model.parameters()]
        logs["grad_norm"].append(torch.stack(norms).norm())
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: parameter.full_tensor().detach().clone() for name, parameter in model.named_parameters()}
    return {**{name: torch.stack(values) for name, values in logs.items()}, **weights}


def sharing_worker(rank: int, port: int, folder: str) -> None:
    set_up(rank, port)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    from hf_turbo.patches import padding
    from hf_turbo.patches.agreement import Agreement

    import hf_turbo
    from hf_turbo import lifecycle
    from tests.models import tiny_model
    from tests.training import perturb

    agreement, shared, run = Agreement(), [], padding._run

    def noted(backbone: Any, stock: Any, kwargs: Any, rest: Any, of: Any, state: Any) -> None:
        shared.append(len(of.micro_batches))
        run(backbone, stock, kwargs, rest, of, state)

    padding._run = noted
    runs = {family: {} for family in ("qwen3", "gemma")}  # the latter with tied weights
    for family, name in itertools.product(runs, ("stock", "perturbed", "turbo")):
        model, announce = tiny_model(family), lambda batches: None
        if name == "perturbed":
            perturb(model)
        if name == "turbo":
            hf_turbo.patch_model(model, padding=True, max_tokens_per_pass=70)
            activation = lifecycle._STATE.enabled

            def announce(batches: list[Any], model: Any = model, activation: Any = activation) -> None:
                padding.batches_fetched(model, batches, activation.passes(model, agreement), is_collective=True)

        shard(model)
        runs[family][name] = accumulate_sharded(model, rank, announce)
    alone = [len(each) for each in alone_plans(rank)]
    hf_turbo.disable()
    agreement.close()
    torch.save({"runs": runs, "shared": shared, "alone": alone}, f"{folder}/rank{rank}.pt")
    leave()


def alone_plans(rank: int) -> list[list[int]]:
    """How this rank would share passes if it were alone."""
    from hf_turbo.policies import batching

    steps = (micro_batches(rank, step) for step in range(SHARED_STEPS))
    return [batching.passes([int(each["attention_mask"].sum()) for each in batches], 70) for batches in steps]


@pytest.mark.newest
def test_fsdp2_shares_the_same_passes_on_all_ranks(tmp_path):
    """Weights are gathered layer by layer: a rank with fewer passes would wait for ever."""
    ranks = start(sharing_worker, tmp_path)
    assert ranks[0]["alone"] != ranks[1]["alone"]
    assert ranks[0]["shared"] == ranks[1]["shared"]
    assert 2 * SHARED_STEPS < len(ranks[0]["shared"]) < 2 * 4 * SHARED_STEPS
    for rank, result in enumerate(ranks):
        for family, runs in result["runs"].items():
            assert_no_drift(runs, f"{family}, rank {rank}")
