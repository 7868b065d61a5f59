"""TRL's trainers, stock and turbo: two steps each of DPO, KTO, reward, GRPO and many kinds of SFT.

Each trains three times: stock; stock from weights of which every one is off by one unit roundoff; turbo. The first two
say how much a rounding error may show in a log or in the updates of the weights; turbo's distance from stock may be 5
times that (each is one draw of chance, and logs of two steps are few numbers), see `compare`. Longer runs:
test_training_curves.py.

On a GPU, TRL hands the head labelled rows alone; 1.16 hands it all rows elsewhere. Tests of a trained head try both.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.utils
from datasets import Dataset
from hf_turbo.patches import labelled_rows
from hf_turbo.patches import trl as trl_patches
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForSequenceClassification, Trainer
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
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from tests.models import tiny_model
from tests.training import (
    COMPLETIONS,
    JUDGED,
    PREFERENCES,
    PROMPTS,
    PlainLogProb,
    Run,
    arguments,
    compare,
    distinct_words,
    tokenizer,
)

pytestmark = pytest.mark.usefixtures("on_cpu")


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


# ------------------------------------------------------------------------------------------------ trainers


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


@pytest.mark.parametrize(
    ("writes", "peft"),
    [(False, None), (True, LoraConfig(r=4, lora_dropout=0.0, task_type="CAUSAL_LM"))],
    ids=["full, as fetched", "lora, written to since"],
)
def test_labelled_rows_are_found_when_batches_are_fetched(peft, writes, monkeypatch, seam_calls, tmp_path):
    """Or, of labels that a training step changes, by TRL. No row at all is labelled in one micro-batch of the four."""
    monkeypatch.setattr(trl.trainer.utils, "_use_triton", lambda device: True, raising=False)
    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", PlainLogProb)
    found, op = [], labelled_rows.select_rows
    monkeypatch.setattr(labelled_rows, "select_rows", lambda *args: found.append(len(args[1])) or op(*args))
    text = [{"prompt": f"w{i}", "completion": f" w{i + 3} w9"} for i in range(8)]

    class Changing(SFTTrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any) -> torch.Tensor:
            if writes:
                inputs["labels"][0, -1] = -100
            return super().training_step(model, inputs, *args)

    def make(folder: Path) -> Trainer:
        batches = itertools.count()

        def collate(rows: Any) -> Any:
            batch = DataCollatorForLanguageModeling(0)(rows)
            if next(batches) == 1:
                batch["labels"][:] = -100
            return batch

        return Changing(
            tiny_model("llama", tie_word_embeddings=peft is None),
            SFTConfig(**arguments(folder, gradient_accumulation_steps=2)),
            train_dataset=Dataset.from_list(text),
            processing_class=tokenizer(),
            data_collator=collate,
            peft_config=peft,
        )

    compare(make, tmp_path)
    assert (0 in found) == bool(found) != writes


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
    assert turbo.patched == {"norms": 5, "mlp": 2, "layers": 2, "rope": 2, "lora": 4, "padding": 1, "loss": 1}
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
