"""TRL's trainers, stock and turbo: two steps each of DPO, KTO, reward, GRPO and many kinds of SFT.

Each trains three times: stock; stock from weights of which every one is off by one unit roundoff; turbo. The first two
say how much a rounding error may show in a log or in the updates of the weights; turbo's distance from stock may be 5
times that (each is one draw of chance, and logs of two steps are few numbers), plus one unit in the last place of the
weight, or of the log-probabilities that a logged number comes from. The optimizer is SGD, as Adam would hide a gradient
of the wrong size. Longer runs: test_training_curves.py.

TRL 1.15 runs a Triton kernel for the fused head even on CPU tensors, so that stock fails there ("0 active drivers"). A
plain torch function of the same arguments takes its place then: stock, turbo and this test see it as TRL's own. On a
GPU, TRL hands the head labelled rows alone; 1.16 hands it all rows elsewhere. Tests of a trained head try both.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.utils
from datasets import Dataset
from hf_turbo.patches import trl as trl_patches
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast, Trainer, set_seed
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

import hf_turbo
from tests.models import VOCABULARY, tiny_model

FACTOR = 5


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


@pytest.fixture(autouse=True)
def fused_head_on_cpu(monkeypatch):
    """See the module."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        trl.trainer.utils._ChunkedLogProbFunction.apply(
            torch.ones(2, 4), torch.ones(8, 4), None, torch.tensor([1, 2]), 1.0, 8
        )
    except RuntimeError as error:
        if "0 active drivers" not in str(error):
            raise
        monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", PlainLogProb)
    yield
    hf_turbo.disable()
    torch.set_num_threads(threads)


@pytest.fixture(params=["as here", "as on a GPU"])
def rows(request, monkeypatch):
    """Which rows TRL hands to the head; see the module."""
    if request.param == "as on a GPU":
        monkeypatch.setattr(trl.trainer.utils, "_use_triton", lambda device: True, raising=False)
        monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", PlainLogProb)
    return request.param


def assert_head_gradient_in_forward(rows: str, seam_calls: list[dict[str, Any]]) -> None:
    """Where all rows count alike; where masked ones are among them, the numbers alone say what is right."""
    assert len(seam_calls) == 2
    if rows == "as on a GPU":
        assert all(call["uniform"] for call in seam_calls)


@pytest.fixture
def seam_calls(monkeypatch):
    """The keyword arguments of each call of our log-probabilities."""
    calls, op = [], trl_patches.linear_log_prob

    def recorded(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return op(*args, **kwargs)

    monkeypatch.setattr(trl_patches, "linear_log_prob", recorded)
    return calls


# ------------------------------------------------------------------------------------------------ data and trainers


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


def arguments(folder: Path, **more: Any) -> dict[str, Any]:
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


def make_dpo(folder: Path) -> Trainer:
    args = DPOConfig(**arguments(folder))
    data = Dataset.from_list(PREFERENCES)
    return DPOTrainer(tiny_model("llama"), tiny_model("llama"), args, train_dataset=data, processing_class=tokenizer())


def make_kto(folder: Path) -> Trainer:
    args = KTOConfig(**arguments(folder))
    data = Dataset.from_list(JUDGED)
    return KTOTrainer(tiny_model("qwen3"), tiny_model("qwen3"), args, train_dataset=data, processing_class=tokenizer())


def make_reward(folder: Path) -> Trainer:
    torch.manual_seed(0)
    config = LlamaConfig(**{**tiny_model("llama").config.to_dict(), "num_labels": 1})
    model = LlamaForSequenceClassification(config).train()
    args = RewardConfig(**arguments(folder))
    return RewardTrainer(model, args, train_dataset=Dataset.from_list(PREFERENCES), processing_class=tokenizer())


def distinct_words(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(set(completion.split()))) + 0.1 * len(completion) for completion in completions]


def make_grpo(folder: Path) -> Trainer:
    more = {"max_completion_length": 5, "num_generations": 4, "beta": 0.1, "use_vllm": False}
    args = GRPOConfig(**arguments(folder, **more))
    model = tiny_model("llama")
    model.save_pretrained(folder / "base")
    model.config._name_or_path = str(folder / "base")  # from where the reference model is loaded
    return GRPOTrainer(
        model,
        distinct_words,
        args,
        train_dataset=Dataset.from_list(PROMPTS),
        processing_class=tokenizer(),
    )


def make_sft(
    folder: Path, model: Any = None, cls: type = SFTTrainer, peft: LoraConfig | None = None, **more: Any
) -> Trainer:
    return cls(
        tiny_model("llama") if model is None else model,
        SFTConfig(**arguments(folder, **more)),
        train_dataset=Dataset.from_list(COMPLETIONS),
        processing_class=tokenizer(),
        peft_config=peft,
    )


# ------------------------------------------------------------------------------------------------ the rule


class Run:
    """Logs, and the change of every trained weight."""

    def __init__(self, make: Callable[[Path], Trainer], folder: Path, turbo: bool = False, roundoffs: int = 0):
        set_seed(0)
        trainer = make(folder)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2.0 - 1
                parameter.mul_(1 + roundoffs * torch.finfo(torch.float32).eps / 2 * signs)
        trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
        before = {name: p.detach().double().clone() for name, p in trained.items()}
        set_seed(0)
        with hf_turbo.session(report=False) if turbo else nullcontext() as report:
            trainer.train()
        self.patched = {row.role: row.patched for row in report.rows} if turbo else {}
        self.logs = trainer.state.log_history
        self.norms = {name: p.detach().double().norm().item() for name, p in trained.items()}
        self.updates = {name: p.detach().double() - before[name] for name, p in trained.items()}

    def logged(self, name: str) -> torch.Tensor:
        return torch.tensor([log[name] for log in self.logs if name in log]).double()


def compare(make: Callable[[Path], Trainer], folder: Path) -> Run:
    """Applies the rule of the module; returns turbo's run."""
    stock = Run(make, folder / "stock")
    perturbed = Run(make, folder / "perturbed", roundoffs=1)
    turbo = Run(make, folder / "turbo", turbo=True)
    eps, failures = torch.finfo(torch.float32).eps, []

    def check(name: str, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, scale: float) -> None:
        turbo_distance, noise = (a - c).norm().item(), (a - b).norm().item()
        if not turbo_distance <= FACTOR * noise + eps * scale:
            failures.append(f"{name}: {turbo_distance:.3e} from stock, perturbed stock {noise:.3e}")

    assert len(turbo.logs) == len(stock.logs)
    for ours, theirs in zip(turbo.logs, stock.logs, strict=True):
        assert [name for name in ours if not name.startswith("turbo/")] == list(theirs)
    names = {name for log in stock.logs for name in log}
    log_probs = max((stock.logged(name).norm().item() for name in names if "logps" in name), default=0.0)
    for name in names:
        if not any(part in name for part in ("runtime", "per_second", "step_time", "profiling")):
            a, b, c = (run.logged(name) for run in (stock, perturbed, turbo))
            check(name, a, b, c, max(a.norm().item(), log_probs))
    for name, update in stock.updates.items():
        check(f"update of {name}", update, perturbed.updates[name], turbo.updates[name], stock.norms[name])
    assert any(update.norm() > 0 for update in stock.updates.values()), "nothing was trained: nothing was tested"
    assert not failures, "\n".join(sorted(failures))
    return turbo


# ------------------------------------------------------------------------------------------------ tests


@pytest.mark.parametrize(("make", "calls"), [(make_dpo, 4), (make_kto, 4), (make_grpo, None)])
def test_preference_and_policy_trainers(make, calls, seam_calls, tmp_path):
    """Their losses weight each row by another number: a gradient that is computed for rows alike would be wrong."""
    turbo = compare(make, tmp_path)
    assert turbo.patched["loss"] == 1
    assert all(patched > 0 for patched in turbo.patched.values())
    assert seam_calls
    assert calls is None or len(seam_calls) >= calls
    assert not any(call["uniform"] for call in seam_calls)


def test_reward_trainer(seam_calls, tmp_path):
    """No language-model head, so no fused loss; the rest is patched."""
    turbo = compare(make_reward, tmp_path)
    assert seam_calls == []
    assert turbo.patched["norms"] == 5
    assert turbo.patched["mlp"] == turbo.patched["rope"] == 2
    assert turbo.patched["loss"] == 0


def test_sft_with_a_trained_head(rows, seam_calls, tmp_path):
    """Regression: off the GPU, TRL 1.16 hands over masked rows too, whose upstream gradient is zero. A head gradient
    computed for equal rows then counts padding as labels, or vanishes if the first row is masked."""
    compare(make_sft, tmp_path)
    assert_head_gradient_in_forward(rows, seam_calls)


def test_sft_without_masked_labels(rows, seam_calls, tmp_path):
    """Rows of one length, all of it trained on."""

    def make(folder: Path) -> Trainer:
        text = [{"text": " ".join(f"w{3 + (5 * row + i) % 90}" for i in range(8))} for row in range(8)]
        return SFTTrainer(
            tiny_model("llama"),
            SFTConfig(**arguments(folder)),
            train_dataset=Dataset.from_list(text),
            processing_class=tokenizer(),
        )

    compare(make, tmp_path)
    assert_head_gradient_in_forward(rows, seam_calls)


def test_sft_dft_weights_rows_differently(rows, seam_calls, tmp_path):
    compare(lambda folder: make_sft(folder, loss_type="dft"), tmp_path)
    assert [call["uniform"] for call in seam_calls] == [False, False]


def test_sft_subclass_with_a_loss_of_its_own(seam_calls, tmp_path):
    """It may weight rows as it likes; here the later tokens count more."""

    class Late(SFTTrainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            outputs = model(**{**inputs, "use_cache": False}, fused_lm_head=True)
            weights = torch.arange(outputs.log_probs.shape[-1], dtype=torch.float32)
            return -(outputs.log_probs * weights).sum() / 100

    compare(lambda folder: make_sft(folder, cls=Late), tmp_path)
    assert seam_calls
    assert not any(call["uniform"] for call in seam_calls)


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_sft_with_a_frozen_head(loss_type, seam_calls, tmp_path):
    lora = LoraConfig(target_modules=["q_proj", "down_proj"], r=4, lora_dropout=0.0, task_type="CAUSAL_LM")
    turbo = compare(lambda folder: make_sft(folder, peft=lora, loss_type=loss_type), tmp_path)
    assert turbo.patched == {"norms": 5, "mlp": 2, "rope": 2, "loss": 1}
    assert len(seam_calls) == 2


def test_sft_of_a_mixture_with_router_loss(rows, seam_calls, tmp_path):
    def make(folder: Path) -> Trainer:
        return make_sft(folder, tiny_model("mixtral", output_router_logits=True, router_aux_loss_coef=0.1))

    turbo = compare(make, tmp_path)
    assert len(turbo.logged("aux_loss")) == 2
    assert_head_gradient_in_forward(rows, seam_calls)


def test_sft_with_a_tied_head(rows, seam_calls, tmp_path):
    """One weight, two gradients."""
    compare(lambda folder: make_sft(folder, tiny_model("llama", tie_word_embeddings=True)), tmp_path)
    assert_head_gradient_in_forward(rows, seam_calls)


def test_sft_with_softcap_and_scale(seam_calls, tmp_path):
    compare(lambda folder: make_sft(folder, tiny_model("gemma2")), tmp_path / "gemma2")
    compare(lambda folder: make_sft(folder, tiny_model("granite")), tmp_path / "granite")
    transforms = [call["transform"] for call in seam_calls]
    assert [transform.softcap for transform in transforms] == [5.0, 5.0, 0.0, 0.0]
    assert [transform.logit_scale for transform in transforms] == [1.0, 1.0, 0.25, 0.25]


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
    ids=["modules_to_save", "adapter"],
)
def test_sft_with_a_head_that_peft_wraps(changes, tmp_path):
    """Runs as stock, or is refused as by stock."""

    def make(folder: Path) -> Trainer:
        return make_sft(folder, peft=LoraConfig(r=4, lora_dropout=0.0, task_type="CAUSAL_LM", **changes))

    try:
        Run(make, tmp_path / "probe")
    except Exception as error:
        refusal = error
    else:
        turbo = compare(make, tmp_path)
        assert any("lm_head" in name for name in turbo.updates)
        assert all(update.norm() > 0 for name, update in turbo.updates.items() if "lm_head" in name)
        return
    with pytest.raises(type(refusal)) as refused:
        Run(make, tmp_path / "turbo", turbo=True)
    assert str(refused.value) == str(refusal)


def test_the_promise_of_equal_weights_ends_with_the_training(tmp_path):
    """A DPO or GRPO trainer of the same model under the same enable() weights rows differently."""
    from hf_turbo.patches import trl as trl_patches

    weight = torch.nn.Parameter(torch.zeros(2, 2))

    class FakeTrainer:
        class model:
            @staticmethod
            def get_output_embeddings():
                class Head:
                    pass

                head = Head()
                head.weight = weight
                return head

    trl_patches._UniformHead(weight).apply()
    assert trl_patches._UNIFORM_HEADS.get(id(weight)) is weight
    trl_patches.end_training(FakeTrainer)
    assert id(weight) not in trl_patches._UNIFORM_HEADS
