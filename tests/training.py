"""Training runs for tests: data with a rule to be learnt, stock against turbo, and how far rounding errors carry.

A training run magnifies the smallest difference, so no run is compared by a tolerance of our choice. Each is trained
three times: stock; stock from weights of which every one is off by one unit roundoff (`perturb`); turbo. The first two
say how far rounding errors carry; turbo may be a small multiple of that away from stock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
import trl.trainer.utils
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, Trainer, set_seed

import hf_turbo
from tests.models import VOCABULARY


@contextmanager
def one_thread() -> Iterator[None]:
    """Two threads on tiny tensors cost more than they bring, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------ data


def sentence(row: int) -> list[int]:
    """Token ids with a rule to be learnt, from 6 to 14 of them."""
    return [3 + (5 * row + 7 * i) % (VOCABULARY - 3) for i in range(6 + row % 9)]


def padded_rows(first: int, count: int) -> list[dict[str, torch.Tensor]]:
    """For a plain Trainer: padded on the right, the first two tokens masked."""
    rows = []
    for row in range(first, first + count):
        ids = sentence(row)
        padding = 14 - len(ids)
        rows.append(
            {
                "input_ids": torch.tensor(ids + [0] * padding),
                "attention_mask": torch.tensor([1] * len(ids) + [0] * padding),
                "labels": torch.tensor([-100, -100, *ids[2:]] + [-100] * padding),
            }
        )
    return rows


def prompts_and_completions(first: int, count: int) -> Dataset:
    """For SFTTrainer, which masks the prompts and pads by itself."""
    words = [[f"w{i}" for i in sentence(row)] for row in range(first, first + count)]
    rows = [{"prompt": " ".join(w[:3]), "completion": " " + " ".join(w[3:])} for w in words]
    return Dataset.from_list(rows)


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(3, VOCABULARY))]
    vocabulary = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="<pad>", eos_token="<eos>")


def words(row: int, step: int) -> str:
    """3 to 7 words."""
    return " ".join(f"w{3 + (5 * row + step * i) % (VOCABULARY - 3)}" for i in range(3 + row % 5))


PREFERENCES = [{"prompt": words(i, 7), "chosen": " " + words(i, 5), "rejected": " " + words(i, 3)} for i in range(8)]
COMPLETIONS = [{"prompt": words(i, 7), "completion": " " + words(i, 5)} for i in range(8)]
JUDGED = [{**row, "label": i % 2 == 0} for i, row in enumerate(COMPLETIONS)]
PROMPTS = [{"prompt": words(i, 7)} for i in range(8)]


def distinct_words(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(set(completion.split()))) + 0.1 * len(completion) for completion in completions]


# ------------------------------------------------------------------------------------------------ TRL's fused head


class PlainLogProb:
    """TRL's ChunkedLogProbFunction in plain torch, differentiated by autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Any,
        weight: Any,
        bias: Any,
        targets: Any,
        temperature: Any,
        chunk_size: Any,
        final_logit_softcapping: Any = None,
        logit_scale: Any = 1.0,
        outputs: Any = (),
    ) -> None:
        """Only its signature is looked at."""

    @staticmethod
    def apply(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[torch.Tensor | None, ...]:
        logits = torch.nn.functional.linear(hidden, weight, bias).float() * logit_scale
        if final_logit_softcapping is not None:
            logits = torch.tanh(logits / final_logit_softcapping) * final_logit_softcapping
        log_probs = (logits / temperature).log_softmax(-1)
        extras = {
            "entropy": -(log_probs.exp() * log_probs).sum(-1),
            "log_sum_sq_probs": (2 * log_probs).logsumexp(-1).detach(),
            "mean_logits": logits.mean(-1).detach() / temperature,
            "is_top1": log_probs.argmax(-1) == targets,
        }
        chosen = log_probs.gather(-1, targets[:, None]).squeeze(-1)
        return chosen, *(extras[name] if name in outputs else None for name in extras)


@contextmanager
def fused_head_on_cpu() -> Iterator[None]:
    """Where stock TRL cannot compute a loss on a CPU, a plain torch function stands in for its Triton kernel.

    TRL 1.15 runs a Triton kernel for the fused head even on CPU tensors, and fails there ("0 active drivers"). Stock,
    turbo and the tests see the function of the same arguments as TRL's own.
    """
    module = trl.trainer.utils
    own = module._ChunkedLogProbFunction
    try:
        if not torch.cuda.is_available():
            own.apply(torch.ones(2, 4), torch.ones(8, 4), None, torch.tensor([1, 2]), 1.0, 8)
    except RuntimeError as error:
        if "0 active drivers" not in str(error):
            raise
        module._ChunkedLogProbFunction = PlainLogProb
    try:
        yield
    finally:
        module._ChunkedLogProbFunction = own


# ------------------------------------------------------------------------------------------------ the rule


def arguments(folder: Path, **more: Any) -> dict[str, Any]:
    """Of two steps. SGD, as Adam would hide a gradient of the wrong size."""
    return {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        **more,
    }


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    assert a.numel()
    return (a - b).square().mean().sqrt().item()


def perturb(model: nn.Module, dtype: torch.dtype | None = None, seed: int = 1) -> None:
    """Every weight off by one unit roundoff of `dtype`, or else of its own type, up or down; quantised ones stay."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2.0 - 1
                # In fp64: in fp32, 1 + eps / 2 is 1, and every second weight would stay.
                factor = 1 + torch.finfo(dtype or parameter.dtype).eps / 2 * signs.double()
                parameter.copy_(parameter.double() * factor.to(parameter.device))


Probe = Callable[[Trainer], dict[str, torch.Tensor]]
R = TypeVar("R")


class Run:
    """One training run: its logs, the change of every trained weight, and what `probe` saw at its end.

    `perturbed` is the seed of a perturbation, 0 for none; `precision` is that of its unit roundoff, where not of the
    weights. `probe` gets the trainer while turbo is still on and returns named tensors. `options` are turbo's.
    """

    def __init__(
        self,
        make: Callable[[Path], Trainer],
        folder: Path,
        *,
        turbo: bool = False,
        perturbed: int = 0,
        precision: torch.dtype | None = None,
        probe: Probe | None = None,
        resume: Path | None = None,
        **options: Any,
    ):
        set_seed(0)
        trainer = make(folder)
        if perturbed:
            perturb(trainer.model, precision, perturbed)
        trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
        before = {name: p.detach().double().clone() for name, p in trained.items()}
        set_seed(0)
        with hf_turbo.session(report=False, **options) if turbo else nullcontext() as report:
            trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
            seen = probe(trainer) if probe else {}
        self.tensors = {name: tensor.detach().clone() for name, tensor in seen.items()}
        # Without the optimizer, which stays stock on a CPU.
        self.patched = {row.role: row.patched for row in report.rows if row.role != "optimizer"} if turbo else {}
        self.reasons = [row.reason for row in report.rows] if turbo else []
        self.logs = trainer.state.log_history
        self.spacing = {name: torch.finfo(p.dtype).eps * p.detach().double().norm() for name, p in trained.items()}
        self.updates = {name: p.detach().double() - before[name] for name, p in trained.items()}

    def logged(self, name: str, after: int = 0) -> torch.Tensor:
        """Logged values of one name, from steps after the given one."""
        return torch.tensor([log[name] for log in self.logs if name in log and log["step"] > after]).double()


def assert_close(stock: Run, perturbed: Sequence[Run], turbo: Run, factor: float, after: int = 0) -> None:
    """Turbo is at most `factor` times as far from stock as perturbed stock is, plus one unit in the last place.

    In every number logged after a step, in the update of every trained weight, and in every tensor of the probe;
    integers are equal. The distance of several perturbed runs is their root mean square. The last place is that of the
    weight, or of the log-probabilities a logged number is from. The mean of the logged losses, `train_loss`, is
    compared with those of its own run.
    """
    failures = []

    def check(name: str, of: Callable[[Run], torch.Tensor], floor: float) -> None:
        a = of(stock).double()
        turbo_distance = (a - of(turbo).double()).norm().item()
        noise = torch.stack([(a - of(run).double()).norm() for run in perturbed]).square().mean().sqrt().item()
        if not turbo_distance <= factor * noise + floor:
            failures.append(f"{name}: {turbo_distance:.3e} from stock, perturbed stock {noise:.3e}")

    assert len(turbo.logs) == len(stock.logs)
    for ours, theirs in zip(turbo.logs, stock.logs, strict=True):
        names = [[name for name in log if not name.startswith("turbo/")] for log in (ours, theirs)]
        # A resumed run has read the earlier logs from a file, with sorted names.
        assert names[0] == names[1] if not after else set(names[0]) == set(names[1])
    eps = torch.finfo(torch.float32).eps
    for name in {"loss", "eval_loss"} & {name for log in stock.logs for name in log}:
        a = stock.logged(name)
        for run in perturbed if a.abs().max() > 100 * eps else ():  # that of RLOO is zero but for roundings
            assert (a - run.logged(name)).norm() <= 0.01 * a.norm(), "roundings do not carry that far: different runs"
    names = {name for log in stock.logs for name in log if not name.startswith("turbo/")}
    if "train_loss" in names:
        names.remove("train_loss")
        for run in () if after else (stock, turbo):  # of a resumed run: the mean of its own steps alone
            torch.testing.assert_close(run.logged("train_loss"), run.logged("loss").mean()[None])
    log_probs = max((stock.logged(name).norm().item() for name in names if "logps" in name), default=0.0)
    for name in names:
        if not any(part in name for part in ("runtime", "per_second", "step_time", "profiling")):
            floor = eps * max(stock.logged(name, after).norm().item(), log_probs)
            check(name, lambda run, name=name: run.logged(name, after), floor)
    assert turbo.updates.keys() == stock.updates.keys()
    for name in stock.updates:
        check(f"update of {name}", lambda run, name=name: run.updates[name], stock.spacing[name].item())
    assert any(update.norm() > 0 for update in stock.updates.values()), "nothing was trained: nothing was tested"
    assert turbo.tensors.keys() == stock.tensors.keys()
    for name, a in stock.tensors.items():
        c = turbo.tensors[name]
        assert (a.dtype, a.shape) == (c.dtype, c.shape), name
        if a.is_floating_point():
            floor = torch.finfo(a.dtype).eps * a.double().norm().item()
            check(name, lambda run, name=name: run.tensors[name], floor)
        elif not torch.equal(a, c):
            changed = [(a != run.tensors[name]).sum().item() for run in perturbed]
            failures.append(f"{name}: {(a != c).sum()} integers of {a.numel()} differ, perturbed {changed}")
    assert not failures, "\n".join(sorted(failures))


def with_enough_draws(draw: Callable[[int], R], check: Callable[[list[R]], None]) -> None:
    """`check` of one perturbed run, or of four.

    One is one draw of chance, and of few numbers: the losses of two steps may be the same bits. Where it does not show
    what a rounding error does, three more are made.

    Args:
        draw: the run of a seed.
    """
    perturbed = [draw(1)]
    try:
        check(perturbed)
    except AssertionError:
        perturbed += [draw(seed) for seed in (2, 3, 4)]
        check(perturbed)


def compare(
    make: Callable[[Path], Trainer],
    folder: Path,
    probe: Probe | None = None,
    factor: float = 5,
    precision: torch.dtype | None = None,
    **options: Any,
) -> Run:
    """Trains three times and applies the rule of `assert_close`; a factor of 5 is for runs of a few steps.

    Returns:
        Turbo's run. The runs are in folder/stock, folder/turbo and folder/perturbed-1.
    """
    stock = Run(make, folder / "stock", probe=probe)
    turbo = Run(make, folder / "turbo", turbo=True, probe=probe, **options)

    def draw(seed: int) -> Run:
        return Run(make, folder / f"perturbed-{seed}", perturbed=seed, precision=precision, probe=probe)

    with_enough_draws(draw, lambda perturbed: assert_close(stock, perturbed, turbo, factor))
    return turbo
