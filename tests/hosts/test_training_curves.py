"""Whole training runs, stock and turbo: every logged number, final weights, files, and resuming each other's runs.

No run is compared by a tolerance of our choice. A training run magnifies the smallest difference, so each scenario also
trains a third time: stock, from weights of which every one is off by one unit roundoff of the precision in use. How far
that run departs from the first is what the scenario makes of a rounding error. The rule: the root mean square distance
of turbo from stock, over all logged values of a name, is at most 3 times that. Each distance is one draw of chance, and
there are more where one is not enough; measured over all names and scenarios, turbo's is 0.2 to 1.4 times the other.

A wrong gradient cannot hide: 1 % is 100,000 roundoffs in fp32. Adam divides a gradient's scale out of the weights, but
the logged gradient norm shows it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed
from trl import SFTConfig, SFTTrainer

import hf_turbo
from tests.models import tiny_model
from tests.training import (
    distance,
    one_thread,
    padded_rows,
    perturb,
    prompts_and_completions,
    tokenizer,
    with_enough_draws,
)

STEPS, SAVE_STEPS = 100, 50
ROWS, FACTOR = 48, 3


@pytest.fixture(scope="module", autouse=True)
def threads() -> Iterator[None]:
    with one_thread():
        yield


# ------------------------------------------------------------------------------------------------ runs


@dataclass(frozen=True)
class Scenario:
    trainer: str  # trainer, sft-lora
    bf16: bool
    checkpointing: bool

    def __str__(self) -> str:
        return f"{self.trainer}-{'bf16' if self.bf16 else 'fp32'}{'-checkpointing' if self.checkpointing else ''}"


@dataclass
class Run:
    """What a training run left behind."""

    folder: Path
    logs: list[dict[str, Any]]
    weights: dict[str, torch.Tensor]
    batches: list[list[list[int]]]
    global_step: int
    scheduler: dict[str, Any]
    report: list[Any] = field(default_factory=list)

    def curve(self, name: str, after: int = 0) -> torch.Tensor:
        """Logged values of one name, from steps after the given one."""
        return torch.tensor([log[name] for log in self.logs if name in log and log["step"] > after]).double()


def make_trainer(scenario: Scenario, folder: Path, perturbed: int) -> Trainer:
    set_seed(0)
    model = tiny_model("qwen3" if scenario.trainer == "trainer" else "llama")
    if perturbed:
        perturb(model, torch.bfloat16 if scenario.bf16 else torch.float32, perturbed)
    arguments = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 2e-3,
        "warmup_steps": 5,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 20,
        "save_strategy": "steps",
        "save_steps": SAVE_STEPS,
        "bf16": scenario.bf16,
        "gradient_checkpointing": scenario.checkpointing,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }
    if scenario.trainer == "trainer":
        data = padded_rows(0, ROWS)
        trainer = Trainer(model, TrainingArguments(**arguments), train_dataset=data, eval_dataset=padded_rows(ROWS, 8))
    else:
        lora = LoraConfig(target_modules="all-linear", r=4, lora_dropout=0.0, task_type="CAUSAL_LM")
        trainer = SFTTrainer(
            model,
            SFTConfig(**arguments, max_length=32),
            train_dataset=prompts_and_completions(0, ROWS),
            eval_dataset=prompts_and_completions(ROWS, 8),
            processing_class=tokenizer(),
            peft_config=lora,
        )
    return trainer


def train(
    scenario: Scenario, folder: Path, *, turbo: bool = False, perturbed: int = 0, resume: Path | None = None
) -> Run:
    """`perturbed` is the seed of a perturbation, 0 for none."""
    trainer = make_trainer(scenario, folder, perturbed)
    batches, collate = [], trainer.data_collator

    def recording(rows: list[Any]) -> Any:
        batch = collate(rows)
        batches.append(batch["input_ids"].tolist())
        return batch

    trainer.data_collator = recording
    report = []
    with hf_turbo.session(report=False) if turbo else nullcontext() as live:
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        if turbo:
            report = live.rows
            trainer.model.save_pretrained(folder / "saved while patched")
    return Run(
        folder,
        trainer.state.log_history,
        {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()},
        batches,
        trainer.state.global_step,
        trainer.lr_scheduler.state_dict(),
        report,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(stock, turbo, stock from weights perturbed with a seed) of a scenario, each run made once."""

    @cache
    def make(scenario: Scenario) -> tuple[Run, Run, Callable[[int], Run]]:
        folder = tmp_path_factory.mktemp(str(scenario))
        skip_if_stock_cannot_run(scenario)

        @cache
        def perturbed(seed: int) -> Run:
            return train(scenario, folder / f"perturbed-{seed}", perturbed=seed)

        return train(scenario, folder / "stock"), train(scenario, folder / "turbo", turbo=True), perturbed

    return make


@cache
def fused_head_runs_here() -> bool:
    """Whether stock TRL can compute a loss: 1.15 runs its Triton kernel on CPU tensors too, 1.16 has a way without."""
    from trl.trainer.utils import _ChunkedLogProbFunction

    try:
        _ChunkedLogProbFunction.apply(torch.ones(2, 4), torch.ones(8, 4), None, torch.tensor([1, 2]), 1.0, 8)
    except RuntimeError as error:
        if "0 active drivers" not in str(error):
            raise
        return False
    return True


def skip_if_stock_cannot_run(scenario: Scenario) -> None:
    if scenario.trainer != "trainer" and not fused_head_runs_here():
        pytest.skip("the fused head of this TRL needs a GPU even in stock (Triton: 0 active drivers)")


# ------------------------------------------------------------------------------------------------ the rule


def assert_no_drift(stock: Run, perturbed: Callable[[int], Run], turbo: Run, names: set[str], after: int = 0) -> None:
    """The rule of the module for curves and final weights; the floor is what a logged number cannot show."""

    def check(draws: list[Run]) -> None:
        failures = []
        for name in [*sorted(names), "final weights"]:
            a, b, *others = (
                vector(run) if name == "final weights" else run.curve(name, after) for run in (stock, turbo, *draws)
            )
            noise = torch.tensor([distance(a, other) for other in others]).square().mean().sqrt().item()
            floor = 0.0 if name == "final weights" else torch.finfo(torch.float32).eps * a.abs().mean().item()
            if not distance(a, b) <= FACTOR * noise + floor:
                failures.append(f"{name}: {distance(a, b):.3e} from stock, perturbed stock {noise:.3e}")
        assert not failures, "\n".join(failures)

    with_enough_draws(perturbed, check)


def vector(run: Run) -> torch.Tensor:
    return torch.cat([weight.double().flatten() for weight in run.weights.values()])


SCENARIOS = [
    Scenario("trainer", bf16=False, checkpointing=False),
    Scenario("trainer", bf16=True, checkpointing=True),
    Scenario("sft-lora", bf16=True, checkpointing=True),
]


def grouped(*scenarios: Scenario) -> list[Any]:
    """The tests of one scenario share its runs, so they go to one process."""
    return [pytest.param(each, id=str(each), marks=pytest.mark.xdist_group(str(each))) for each in scenarios]


@pytest.mark.parametrize("scenario", grouped(*SCENARIOS))
def test_curves_and_weights(runs, scenario):
    stock, turbo, perturbed = runs(scenario)
    # On a CPU the optimizer of torch is as fast.
    assert [row.role for row in turbo.report if not row.patched] == ["optimizer"]
    names = {name for log in stock.logs for name in log}
    continuous = {"loss", "grad_norm", "eval_loss", "train_loss"} & names
    if scenario.trainer != "trainer":
        continuous |= {"entropy", "mean_token_accuracy", "eval_entropy", "eval_mean_token_accuracy"}
        assert turbo.curve("num_tokens").tolist() == stock.curve("num_tokens").tolist()
    assert continuous <= names
    assert len(stock.curve("loss")) == STEPS
    assert_no_drift(stock, perturbed, turbo, continuous)
    assert stock.curve("loss")[-10:].mean() < stock.curve("loss")[:10].mean(), "nothing was learnt: nothing was tested"


@pytest.mark.parametrize("scenario", grouped(*SCENARIOS))
def test_what_must_not_change_at_all(runs, scenario):
    """Names of metrics, the order of samples, the schedule."""
    stock, turbo, _ = runs(scenario)
    assert len(turbo.logs) == len(stock.logs)
    for ours, theirs in zip(turbo.logs, stock.logs, strict=True):
        assert [name for name in ours if not name.startswith("turbo/")] == list(theirs)
        for name in ("step", "epoch", "learning_rate", "num_tokens"):
            assert ours.get(name) == theirs.get(name)
    assert turbo.batches == stock.batches
    assert turbo.global_step == stock.global_step == STEPS
    assert turbo.scheduler == stock.scheduler


@pytest.mark.parametrize("scenario", grouped(*SCENARIOS))
def test_saved_files_know_nothing_of_hf_turbo(runs, scenario):
    """The same files with the same contents but for numbers, and no pickle that names a class of ours."""
    stock, turbo, _ = runs(scenario)
    for step in (SAVE_STEPS, STEPS):
        ours, theirs = (run.folder / f"checkpoint-{step}" for run in (turbo, stock))
        assert sorted(file.name for file in ours.iterdir()) == sorted(file.name for file in theirs.iterdir())
        for file in ours.iterdir():
            assert b"hf_turbo" not in file.read_bytes(), file.name
            if file.suffix == ".json" and file.name != "trainer_state.json":
                assert json.loads(file.read_text()) == json.loads((theirs / file.name).read_text()), file.name
        if scenario.trainer != "sft-lora":
            assert json.loads((ours / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
            assert_loads_as_stock(ours, turbo)
    for name, value in weights_of(turbo.folder / "saved while patched").items():
        assert torch.equal(value, weights_of(turbo.folder / f"checkpoint-{STEPS}")[name]), name


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def assert_loads_as_stock(folder: Path, run: Run) -> None:
    model, information = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not information["missing_keys"]
    assert not information["unexpected_keys"]
    assert all("_hf_turbo_stock_forward" not in vars(type(module)) for module in model.modules())
    if folder.name == f"checkpoint-{STEPS}":
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, run.weights[name]), name


@pytest.mark.newest
@pytest.mark.parametrize("scenario", grouped(SCENARIOS[0], SCENARIOS[2]))
@pytest.mark.parametrize("begun", ["stock", "turbo"])
def test_a_run_begun_by_the_other_resumes_on_the_same_curve(runs, scenario, begun, tmp_path):
    stock, turbo, perturbed = runs(scenario)
    half = (stock if begun == "stock" else turbo).folder / f"checkpoint-{SAVE_STEPS}"
    resumed = train(scenario, tmp_path, turbo=begun == "stock", resume=half)
    assert resumed.global_step == STEPS
    assert resumed.scheduler == stock.scheduler
    # Stock fetches the batches of an epoch up to the one it resumes at, and drops them.
    assert resumed.batches[-SAVE_STEPS * 2 :] == stock.batches[-SAVE_STEPS * 2 :]
    assert_no_drift(stock, perturbed, resumed, {"loss", "grad_norm", "eval_loss"}, after=SAVE_STEPS)
