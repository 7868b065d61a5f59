"""PEFT adapters on dense and quantised models in whole training runs, stock and turbo.

The rule is that of tests/training.py: turbo's distance from stock is at most a few times that of a stock run whose
weights are all off by one unit roundoff. Weights of the tiny models are random, adapters begin at random values too
(`init_lora_weights=False`): with PEFT's zero in lora_B, lora_A would get no gradient in short runs.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
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
from tests.models import Float64Mode, tiny_model
from tests.training import (
    JUDGED,
    PREFERENCES,
    PROMPTS,
    Run,
    arguments,
    assert_close,
    compare,
    distinct_words,
    fused_head_on_cpu,
    one_thread,
    padded_rows,
    prompts_and_completions,
    tokenizer,
)

pytestmark = pytest.mark.newest

bitsandbytes = pytest.importorskip("bitsandbytes")

ROOT = Path(__file__).resolve().parent.parent.parent
SIZES = {"hidden_size": 64, "intermediate_size": 128}  # whole blocks of bitsandbytes


@pytest.fixture(scope="module", autouse=True)
def on_cpu() -> Iterator[None]:
    with one_thread(), fused_head_on_cpu():
        yield


# ------------------------------------------------------------------------------------------------ models


QUANTISED: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}

Load = Callable[..., nn.Module]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Makes a tiny model with dense ("fp32") or quantised weights; the same ones at each call."""

    @cache
    def folder(family: str, changes: tuple[tuple[str, Any], ...]) -> Path:
        path = tmp_path_factory.mktemp(family)
        tiny_model(family, **dict(changes)).save_pretrained(path)
        return path

    def load(base: str = "fp32", family: str = "llama", compute: str = "float32", **changes: Any) -> nn.Module:
        changes = {**SIZES, **changes}
        if base == "fp32":
            model = tiny_model(family, **changes)
            torch.manual_seed(0)
            return model
        how = dict(QUANTISED[base])
        if base.startswith("nf4"):
            how["bnb_4bit_compute_dtype"] = compute
        model = AutoModelForCausalLM.from_pretrained(
            folder(family, tuple(changes.items())),
            quantization_config=BitsAndBytesConfig(**how),
            device_map={"": "cpu"},
            dtype=torch.float32,
            attn_implementation="sdpa",
        )
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                # On such CPUs bitsandbytes repacks the weights at the first evaluation, and adapters below them get no
                # gradient any more: a run would depend on the CPU. See test_evaluation_may_repack_the_weights.
                module.support_avx512bf16_for_cpu = False
        torch.manual_seed(0)  # adapters begin alike, whatever was drawn above
        return model.train()

    return load


def lora(**changes: Any) -> LoraConfig:
    settings = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear"}
    return LoraConfig(**{**settings, "init_lora_weights": False, "task_type": "CAUSAL_LM", **changes})


def causal_lm(model: nn.Module, folder: Path, **more: Any) -> Trainer:
    """A plain Trainer."""
    callbacks = more.pop("callbacks", None)
    args = TrainingArguments(**arguments(folder, **more))
    return Trainer(model, args, train_dataset=padded_rows(0, 24), eval_dataset=padded_rows(24, 4), callbacks=callbacks)


def assert_lora_is_patched(run: Run) -> None:
    assert run.patched["lora"] > 0
    assert run.patched["norms"] > 0


# ------------------------------------------------------------------------------------------------ a hundred steps


@dataclass(frozen=True)
class Curve:
    trainer: str
    base: str
    bf16: bool = False
    reentrant: bool | None = None  # None: no checkpointing

    def __str__(self) -> str:
        ending = {None: "", True: "-reentrant", False: "-nonreentrant"}[self.reentrant]
        return f"{self.trainer}-{self.base}-{'bf16' if self.bf16 else 'fp32'}{ending}"

    def make(self, load: Load, folder: Path, **more: Any) -> Trainer:
        settings: dict[str, Any] = {
            "max_steps": 100,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2 if self.base == "fp32" and self.reentrant is None else 1,
            "learning_rate": 2e-3,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 5,
            "optim": "adamw_torch",
            "eval_strategy": "steps",
            "eval_steps": 25,
            "bf16": self.bf16,
            "gradient_checkpointing": self.reentrant is not None,
            **more,
        }
        if self.reentrant is not None:
            settings["gradient_checkpointing_kwargs"] = {"use_reentrant": self.reentrant}
        model = load(self.base, compute="bfloat16" if self.bf16 else "float32")
        if self.trainer == "trainer":
            model = get_peft_model(model, lora())
            if self.reentrant is not None:
                model.enable_input_require_grads()
            return causal_lm(model, folder, **settings)
        return SFTTrainer(
            model,
            SFTConfig(**arguments(folder, **settings), max_length=32),
            train_dataset=prompts_and_completions(0, 48),
            eval_dataset=prompts_and_completions(48, 4),
            processing_class=tokenizer(),
            peft_config=lora(),
        )


CURVES = [
    Curve("trainer", "int8", bf16=True, reentrant=False),
    Curve("sft", "nf4-double", bf16=True, reentrant=False),
]


@pytest.mark.parametrize("curve", CURVES, ids=str)
def test_a_hundred_steps(curve, load, tmp_path):
    precision = torch.bfloat16 if curve.bf16 else None
    turbo = compare(lambda folder: curve.make(load, folder), tmp_path, factor=3, precision=precision)
    losses = turbo.logged("loss")
    assert len(losses) == 100
    assert losses[-10:].mean() < losses[:10].mean(), "nothing was learnt: nothing was tested"
    assert len(turbo.logged("eval_loss")) == 4
    assert_lora_is_patched(turbo)


class Recorder(TrainerCallback):
    """The adapters and their gradients before some optimizer steps, and the batch of each step."""

    def __init__(self, every: int):
        self.every = every
        self.batches: list[dict[str, torch.Tensor]] = []
        self.kept: list[tuple[int, dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []

    def listen(self, trainer: Trainer) -> Trainer:
        collate = trainer.data_collator

        def recording(rows: list[Any]) -> Any:
            self.batches.append(collate(rows))
            return self.batches[-1]

        trainer.data_collator = recording
        trainer.add_callback(self)
        return trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
            weights = {name: p.detach().clone() for name, p in trained.items()}
            self.kept.append((state.global_step, weights, {name: p.grad.clone() for name, p in trained.items()}))


def gradients(model: nn.Module, weights: dict[str, torch.Tensor], batch: Any, bf16: bool = False) -> dict[str, Any]:
    trained = {name: p for name, p in model.named_parameters() if name in weights}
    assert trained.keys() == weights.keys()
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(**batch).loss
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


def in_fp64(quantised: nn.Module, dense: nn.Module) -> nn.Module:
    """A dense model with the weights that a quantised one stands for."""
    for name, module in quantised.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            dense.get_submodule(name).weight.data.copy_(weight)
    return dense.double()


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("base", "family"),
    [("fp32", "phi3"), ("fp32", "gemma2"), ("nf4-double", "llama-bias")],
)
def test_gradients_along_a_run_are_no_further_from_fp64(base, family, bf16, load, tmp_path):
    """At the weights that a turbo run passes through: err(turbo, fp64) <= 1.1 err(stock, fp64), over all adapters."""

    def model(base: str = base) -> nn.Module:
        return get_peft_model(load(base, family, compute="bfloat16" if bf16 else "float32"), lora())

    recorder = Recorder(every=3)
    settings = {"max_steps": 30, "optim": "adamw_torch", "learning_rate": 2e-3, "max_grad_norm": 0.0, "bf16": bf16}
    turbo = Run(lambda folder: recorder.listen(causal_lm(model(), folder, **settings)), tmp_path, turbo=True)
    assert_lora_is_patched(turbo)
    stock, reference = model(), in_fp64(model(), model("fp32"))
    errors = {"turbo": 0.0, "stock": 0.0}
    assert len(recorder.kept) == 10
    for step, weights, ours in recorder.kept:
        batch = recorder.batches[step]
        with Float64Mode():
            exact = gradients(reference, weights, batch)
        theirs = gradients(stock, weights, batch, bf16)
        for name, gradient in exact.items():
            scale = gradient.square().sum()
            errors["turbo"] += ((ours[name] - gradient).square().sum() / scale).item()
            errors["stock"] += ((theirs[name] - gradient).square().sum() / scale).item()
    assert errors["turbo"] ** 0.5 <= 1.1 * errors["stock"] ** 0.5, {name: e**0.5 for name, e in errors.items()}


# ------------------------------------------------------------------------------------------------ kinds of adapters


def two_adapters(model: nn.Module) -> nn.Module:
    """Both active, both trained."""
    peft = get_peft_model(model, lora())
    peft.add_adapter("second", lora(r=4, target_modules=["q_proj", "up_proj"]))
    peft.base_model.set_adapter(["default", "second"])
    return peft


def frozen_a(model: nn.Module) -> nn.Module:
    """LoRA-FA: lora_A stays."""
    peft = get_peft_model(model, lora())
    for name, parameter in peft.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad = False
    return peft


@dataclass(frozen=True)
class Kind:
    """An adapter on a model: settings of LoraConfig, another configuration, or a function."""

    settings: Any = None
    base: str = "fp32"
    family: str = "llama"
    changes: tuple[tuple[str, Any], ...] = ()
    training: tuple[tuple[str, Any], ...] = ()

    def model(self, load: Load) -> nn.Module:
        model = load(self.base, self.family, **dict(self.changes))
        if callable(self.settings):
            return self.settings(model)
        config = lora(**self.settings) if isinstance(self.settings, dict) else self.settings
        return get_peft_model(model, copy.deepcopy(config))


TIED = (("tie_word_embeddings", True),)
PATTERNS = {"rank_pattern": {"q_proj": 4, "down_proj": 16}, "alpha_pattern": {"v_proj": 4, "down_proj": 64}}
PROMPT = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
IA3 = IA3Config(
    task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
KINDS = {
    "zero-begin": Kind({"init_lora_weights": True}),
    "gaussian": Kind({"init_lora_weights": "gaussian"}),
    "pissa": Kind({"init_lora_weights": "pissa"}),
    "rslora": Kind({"use_rslora": True}),
    "dora": Kind({"use_dora": True}),
    "dora-some": Kind({"use_dora": True, "target_modules": ["k_proj", "gate_proj"]}),
    "bias-all": Kind({"bias": "all"}, family="llama-bias"),
    "bias-lora-only": Kind({"bias": "lora_only"}, family="qwen2"),
    "lora-bias": Kind({"lora_bias": True}),
    "patterns": Kind(PATTERNS),
    "some-layers": Kind({"layers_to_transform": [1], "target_modules": ATTENTION}),
    "lonely-projections": Kind({"target_modules": ["k_proj", "gate_proj"]}),
    "head-and-embeddings": Kind({"target_modules": ["q_proj", "lm_head", "embed_tokens"]}),
    "head-saved": Kind({"modules_to_save": ["lm_head"]}),
    "embeddings-and-norms-saved": Kind({"modules_to_save": ["embed_tokens", "input_layernorm"]}),
    "mlp-saved": Kind({"target_modules": ATTENTION, "modules_to_save": ["up_proj"]}),
    "trained-tokens": Kind({"trainable_token_indices": [3, 4, 5]}),
    "tied": Kind({}, changes=TIED),
    "tied-head": Kind({"target_modules": ["q_proj", "lm_head"]}, changes=TIED),
    "tied-embeddings": Kind({"target_modules": ["v_proj", "embed_tokens"]}, changes=TIED),
    "tied-saved": Kind({"modules_to_save": ["lm_head", "embed_tokens"], "ensure_weight_tying": True}, changes=TIED),
    "alora": Kind({"alora_invocation_tokens": [10]}, training=(("per_device_train_batch_size", 24),)),
    "two-adapters": Kind(two_adapters),
    "frozen-a": Kind(frozen_a),
    "phi3": Kind({}, family="phi3"),
    "gemma2": Kind({}, family="gemma2"),
    "gemma3": Kind({}, family="gemma3"),
    "moe-all-linear": Kind({}, family="qwen3-moe"),
    "moe-experts": Kind(
        {"target_modules": ATTENTION, "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        family="qwen3-moe",
    ),
    "checkpointing": Kind({"target_modules": ATTENTION}, training=(("gradient_checkpointing", True),)),
    "nf4-rslora": Kind({"use_rslora": True}, base="nf4"),
    "nf4-bias-all": Kind({"bias": "all"}, base="nf4", family="llama-bias"),
    "nf4-patterns": Kind(PATTERNS, base="nf4-double"),
    "nf4-dora": Kind({"use_dora": True}, base="nf4-double"),
    "nf4-head-saved": Kind({"modules_to_save": ["lm_head"]}, base="nf4-double"),
    "nf4-two-adapters": Kind(two_adapters, base="nf4"),
    "nf4-odd-blocks": Kind({}, base="nf4-double", changes=(("hidden_size", 48), ("intermediate_size", 80))),
    "nf4-bf16": Kind({}, base="nf4-double", training=(("bf16", True), ("gradient_checkpointing", True))),
    "int8-rslora": Kind({"use_rslora": True}, base="int8"),
    "ia3": Kind(IA3),
    "prompt-tuning": Kind(PROMPT),
}


def answers(model: nn.Module, adapters: bool = True) -> torch.Tensor:
    """Logits in evaluation; `model` is in the mode it was in afterwards."""
    batch = {name: torch.stack([row[name] for row in padded_rows(30, 3)]) for name in ("input_ids", "attention_mask")}
    training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(**batch).logits
    model.train(training)
    return logits


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_kinds_of_adapters(kind, load, tmp_path):
    """They train, answer and are saved as in stock, and what turbo saved is what it had, in PEFT alone."""

    def probe(trainer: Trainer) -> dict[str, torch.Tensor]:
        peft = trainer.model
        seen = {f"trained {name}": p for name, p in peft.named_parameters() if p.requires_grad}
        seen["answers"] = answers(peft)
        with peft.disable_adapter():
            seen["answers without adapters"] = answers(peft)
        peft.save_pretrained(Path(trainer.args.output_dir) / "adapter")
        return seen

    training = dict(kind.training)
    precision = torch.bfloat16 if training.get("bf16") else None
    turbo = compare(
        lambda folder: causal_lm(kind.model(load), folder, **training), tmp_path, probe, precision=precision
    )

    ours, theirs = (tmp_path / name / "adapter" for name in ("turbo", "stock"))
    files = sorted(file.relative_to(ours) for file in ours.rglob("*.*"))
    assert files == sorted(file.relative_to(theirs) for file in theirs.rglob("*.*"))
    for file in files:
        assert b"hf_turbo" not in (ours / file).read_bytes(), file
        if file.suffix == ".json":
            assert json.loads((ours / file).read_text()) == json.loads((theirs / file).read_text()), file
        elif file.suffix == ".safetensors":
            tensors = [load_file(side / file) for side in (ours, theirs)]
            saved = [{name: (tensor.dtype, tensor.shape) for name, tensor in side.items()} for side in tensors]
            assert saved[0] == saved[1], file
    if (ours / "adapter_model.safetensors").exists() and kind.settings is not frozen_a:
        trained = {name: tensor for name, tensor in turbo.tensors.items() if name.startswith("trained ")}
        assert_loads_in_plain_peft(kind, load, ours, trained)


def assert_loads_in_plain_peft(kind: Kind, load: Load, saved: Path, trained: dict[str, torch.Tensor]) -> None:
    """The same bits as from a stock model whose weights are set to those that turbo had."""
    changes = dict(kind.changes)
    loaded = PeftModel.from_pretrained(load(kind.base, kind.family, **changes), saved)
    if (saved / "second").exists():
        loaded.load_adapter(saved / "second", "second")
        loaded.base_model.set_adapter(["default", "second"])
    expected = kind.model(load)
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            if f"trained {name}" in trained:
                parameter.copy_(trained.pop(f"trained {name}"))
    assert not trained
    assert torch.equal(answers(loaded), answers(expected))


# ------------------------------------------------------------------------------------------------ at any time

Answers = dict[str, torch.Tensor]


def gradients_of(model: nn.Module) -> Answers:
    """Of everything trained, at a batch, as in training; `.grad` is not touched."""
    batch = {name: torch.stack([row[name] for row in padded_rows(40, 2)]) for name in padded_rows(0, 1)[0]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(model(**batch).loss, list(trained.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(trained, found, strict=True) if gradient is not None}


def look(peft: Any, folder: Path) -> Answers:
    return {"answers": answers(peft), **gradients_of(peft)}


def disable(peft: Any, folder: Path) -> Answers:
    """For answers, and for a loss with a gradient that must not see the adapters."""
    with peft.disable_adapter():
        seen = {"disabled": answers(peft), "disabled in training": peft(input_ids=torch.arange(3, 13)[None]).logits}
    return {**seen, "enabled": answers(peft)}


def merge(peft: Any, folder: Path) -> Answers:
    """In place, and out again."""
    peft.merge_adapter()
    seen = {"merged": answers(peft), "merged in training": peft(input_ids=torch.arange(3, 13)[None]).logits}
    peft.unmerge_adapter()
    return {**seen, **look(peft, folder)}


def merge_and_unload(peft: Any, folder: Path) -> Answers:
    """Of a copy. Everything is PEFT's and torch's own afterwards."""
    merged = copy.deepcopy(peft).merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_modules())
    return {"merged": answers(merged), **dict(merged.named_parameters())}


def unload(peft: Any, folder: Path) -> Answers:
    return {"unloaded": answers(copy.deepcopy(peft).unload())}


def add(peft: Any, folder: Path) -> Answers:
    """Another rank and other modules, looked at and left there."""
    torch.manual_seed(5)
    peft.add_adapter("added", lora(r=4, target_modules=["k_proj", "down_proj"]))
    peft.set_adapter("added")
    seen = look(peft, folder)
    peft.set_adapter("default")
    return {f"added: {name}": tensor for name, tensor in seen.items()} | look(peft, folder)


def add_and_delete(peft: Any, folder: Path) -> Answers:
    torch.manual_seed(5)
    peft.add_adapter("added", lora())
    peft.set_adapter("added")
    seen = {"added": answers(peft)}
    peft.set_adapter("default")
    peft.delete_adapter("added")
    return {**seen, **look(peft, folder)}


def save_and_load(peft: Any, folder: Path) -> Answers:
    """Into the adapter it was saved from, after it was spoilt."""
    peft.save_pretrained(folder)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    spoilt = {"spoilt": answers(peft)}
    peft.load_adapter(folder, "default", is_trainable=True)
    assert sorted(load_file(folder / "adapter_model.safetensors")) == sorted(get_peft_model_state_dict(peft))
    return {**spoilt, **look(peft, folder), **get_peft_model_state_dict(peft)}


def load_another(peft: Any, folder: Path) -> Answers:
    peft.save_pretrained(folder)
    peft.load_adapter(folder, "loaded")
    peft.set_adapter("loaded")
    assert torch.equal(answers(peft), answers(peft))
    seen = {"loaded": answers(peft)}
    peft.set_adapter("default")
    return {**seen, **look(peft, folder)}


def weighted_sum(peft: Any, folder: Path) -> Answers:
    torch.manual_seed(5)
    peft.add_adapter("added", lora())
    peft.add_weighted_adapter(["default", "added"], [0.5, 2.0], "sum", combination_type="cat")
    peft.set_adapter("sum")
    seen = {"sum": answers(peft)}
    peft.set_adapter("default")
    return seen


def both_active(peft: Any, folder: Path) -> Answers:
    """From here on; the added one has no optimizer."""
    torch.manual_seed(5)
    peft.add_adapter("added", lora(r=4))
    peft.base_model.set_adapter(["default", "added"])
    return look(peft, folder)


def rescale(peft: Any, folder: Path) -> Answers:
    """From here on."""
    for module in peft.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.5)
    return look(peft, folder)


def mixed_batch(peft: Any, folder: Path) -> Answers:
    """A row by the base model, a row by the adapter."""
    peft.eval()
    with torch.no_grad():
        inputs = torch.arange(3, 15).view(2, 6)
        seen = {"mixed": peft(input_ids=inputs, adapter_names=["__base__", "default"]).logits}
    peft.train()
    return seen


def generate(peft: Any, folder: Path) -> Answers:
    peft.eval()
    prompt = torch.arange(3, 15).view(2, 6)
    tokens = peft.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, min_new_tokens=6, do_sample=False
    )
    peft.train()
    return {"tokens": tokens}


def freeze_some(peft: Any, folder: Path) -> Answers:
    """From here on."""
    for name, parameter in peft.named_parameters():
        if "layers.0" in name and ("lora_A" in name or "q_proj" in name):
            parameter.requires_grad = False
            parameter.grad = None
    return look(peft, folder)


def hooks(peft: Any, folder: Path) -> Answers:
    """On the parts of a LoRA layer, from here on: they see what they saw, and may change it."""
    seen: Answers = {}

    def keep(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            seen[name] = output.detach()

        return hook

    layers = [module for module in peft.modules() if hasattr(module, "lora_A")]
    q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj = layers[:7]
    q_proj.register_forward_hook(keep("q_proj"))
    k_proj.base_layer.register_forward_hook(lambda module, inputs, output: output * 1.25)
    v_proj.lora_A["default"].register_forward_hook(keep("lora_A of v_proj"))
    o_proj.lora_B["default"].register_forward_hook(lambda module, inputs, output: output * 0.5)
    gate_proj.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0.5, *inputs[1:]))
    up_proj.register_forward_hook(keep("up_proj"))
    down_proj.lora_A["default"].register_full_backward_hook(
        lambda module, before, after: (None if before[0] is None else before[0] * 2,)
    )
    return {**look(peft, folder), **seen}


def change_the_base(peft: Any, folder: Path) -> Answers:
    """In place, and by other storage: what was kept of the frozen weights is stale."""
    for name, module in peft.named_modules():
        base = getattr(module, "base_layer", None)
        if type(base) is nn.Linear:
            base.weight.data.mul_(1.5)
            if "q_proj" in name:
                base.weight.data = base.weight.data.clone() * 0.5
        elif isinstance(base, bitsandbytes.nn.Linear4bit):
            base.weight.data = base.weight.data.flip(0)
            state = base.weight.quant_state
            if "q_proj" in name:
                state.absmax = state.absmax.flip(0)
            else:
                weight = bitsandbytes.functional.dequantize_4bit(base.weight.data, state) * 1.5
                base.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to("cpu")
    return look(peft, folder)


def replace_the_adapter(peft: Any, folder: Path) -> Answers:
    """By parameters of the same values times 1.5: other objects, which no optimizer knows."""
    for module in peft.modules():
        if hasattr(module, "lora_B") and "default" in module.lora_B:
            weight = module.lora_B["default"].weight
            module.lora_B["default"].weight = nn.Parameter(weight.detach() * 1.5)
    return look(peft, folder)


def through_the_inputs(peft: Any, folder: Path) -> Answers:
    """A gradient with respect to input embeddings, twice through one graph."""
    torch.manual_seed(5)
    embeddings = torch.randn(2, 7, peft.config.hidden_size, requires_grad=True)
    total = peft(inputs_embeds=embeddings).logits.square().mean()
    first = torch.autograd.grad(total, embeddings, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(total, embeddings)[0])
    return {"gradient of embeddings": first}


def two_graphs(peft: Any, folder: Path) -> Answers:
    """Two forwards, then the backward of the first, then that of both in one."""
    first, second = (peft(input_ids=torch.arange(k, k + 8)[None]).logits.square().mean() for k in (3, 20))
    trained = {name: p for name, p in peft.named_parameters() if p.requires_grad}
    alone = torch.autograd.grad(first, list(trained.values()), retain_graph=True)
    both = torch.autograd.grad(first + 2 * second, list(trained.values()))
    return {
        **{f"first: {name}": gradient for name, gradient in zip(trained, alone, strict=True)},
        **{f"both: {name}": gradient for name, gradient in zip(trained, both, strict=True)},
    }


def one_row_and_one_token(peft: Any, folder: Path) -> Answers:
    """Shapes that kernels like to treat apart."""
    return {
        "one token": peft(input_ids=torch.tensor([[5]])).logits,
        "five rows of one": peft(input_ids=torch.arange(3, 8)[:, None]).logits,
    }


def checkpoint_from_now(peft: Any, folder: Path) -> Answers:
    peft.enable_input_require_grads()
    peft.gradient_checkpointing_enable({"use_reentrant": False})
    return look(peft, folder)


ACTIONS = [
    look,
    disable,
    merge,
    merge_and_unload,
    unload,
    add,
    add_and_delete,
    save_and_load,
    load_another,
    weighted_sum,
    both_active,
    rescale,
    mixed_batch,
    generate,
    freeze_some,
    hooks,
    change_the_base,
    replace_the_adapter,
    through_the_inputs,
    two_graphs,
    one_row_and_one_token,
    checkpoint_from_now,
]


class Meddler(TrainerCallback):
    """Does something to the model after the second step, and keeps what it saw."""

    def __init__(self, action: Callable[[Any, Path], Answers]):
        self.action, self.seen = action, {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 2:
            seen = self.action(model, Path(args.output_dir) / "during")
            self.seen = {f"during: {name}": tensor.detach().clone() for name, tensor in seen.items()}


@pytest.mark.parametrize(
    ("base", "action"),
    [("fp32" if i % 2 else "nf4-double", action) for i, action in enumerate(ACTIONS)],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_anything_may_be_done_during_training_and_after(action, base, load, tmp_path):
    """Four steps, the first two before it. What it shows, and all that is trained later, is as in stock."""

    def make(folder: Path) -> Trainer:
        peft = get_peft_model(load(base), lora())
        return causal_lm(peft, folder, max_steps=4, callbacks=[Meddler(action)])

    def probe(trainer: Trainer) -> Answers:
        meddler = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Meddler))
        after = {"after: answers": answers(trainer.model)}
        if action in (disable, merge, merge_and_unload, save_and_load, load_another, generate, through_the_inputs):
            again = action(trainer.model, Path(trainer.args.output_dir) / "after")
            after |= {f"after: {name}": tensor for name, tensor in again.items()}
        if action is merge_and_unload:
            merged = trainer.model.merge_and_unload()
            after |= {f"merged: {name}": p for name, p in merged.named_parameters()}
            after["merged: answers"] = answers(merged)
        assert meddler.seen
        return meddler.seen | after

    compare(make, tmp_path, probe)


# ------------------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize(
    ("base", "optim"), [("fp32", "adamw_torch"), ("fp32", "adamw_8bit"), ("nf4-double", "paged_adamw_8bit")]
)
def test_a_run_begun_by_the_other_resumes_on_the_same_curve(base, optim, load, tmp_path):
    """In its middle, from what stock or turbo left; rank 64, as bitsandbytes keeps small states in 32 bits."""
    half, whole = 8, 16

    def make(folder: Path) -> Trainer:
        peft = get_peft_model(load(base), lora(r=64, lora_alpha=64))
        settings = {"max_steps": whole, "save_strategy": "steps", "save_steps": half, "lr_scheduler_type": "linear"}
        return causal_lm(peft, folder, optim=optim, learning_rate=2e-3, **settings)

    stock, turbo = Run(make, tmp_path / "stock"), Run(make, tmp_path / "turbo", turbo=True)
    perturbed = [Run(make, tmp_path / "perturbed", perturbed=1)]
    assert_close(stock, perturbed, turbo, factor=5)
    for begun in ("stock", "turbo"):
        checkpoint = tmp_path / begun / f"checkpoint-{half}"
        if "8bit" in optim:
            states = torch.load(checkpoint / "optimizer.pt", weights_only=False)["state"]
            assert any(tensor.dtype == torch.uint8 for tensor in tree_leaves(states) if torch.is_tensor(tensor))
        resumed = Run(make, tmp_path / f"begun by {begun}", turbo=begun == "stock", resume=checkpoint)
        assert_close(stock, perturbed, resumed, factor=5, after=half)


# ------------------------------------------------------------------------------------------------ other trainers


def make_dpo(load: Load, base: str, folder: Path) -> Trainer:
    """The reference is the policy without its adapters."""
    args = DPOConfig(**arguments(folder))
    data = Dataset.from_list(PREFERENCES)
    return DPOTrainer(load(base), None, args, train_dataset=data, processing_class=tokenizer(), peft_config=lora())


def make_kto(load: Load, base: str, folder: Path) -> Trainer:
    args = KTOConfig(**arguments(folder))
    data = Dataset.from_list(JUDGED)
    return KTOTrainer(load(base), None, args, train_dataset=data, processing_class=tokenizer(), peft_config=lora())


def make_grpo(load: Load, base: str, folder: Path) -> Trainer:
    """Generates with the adapters, and has a reference without them."""
    more = {"max_completion_length": 5, "num_generations": 4, "beta": 0.1, "use_vllm": False}
    args = GRPOConfig(**arguments(folder, **more))
    data = Dataset.from_list(PROMPTS)
    return GRPOTrainer(
        load(base), distinct_words, args, train_dataset=data, processing_class=tokenizer(), peft_config=lora()
    )


def make_reward(load: Load, base: str, folder: Path) -> Trainer:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**{**load().config.to_dict(), "num_labels": 1})).train()
    args = RewardConfig(**arguments(folder))
    config = lora(task_type="SEQ_CLS", modules_to_save=["score"], target_modules=ATTENTION)
    data = Dataset.from_list(PREFERENCES)
    return RewardTrainer(model, args, train_dataset=data, processing_class=tokenizer(), peft_config=config)


@pytest.mark.parametrize(
    ("make", "base"),
    [
        (make_dpo, "fp32"),
        (make_dpo, "nf4-double"),
        (make_kto, "fp32"),
        (make_grpo, "fp32"),
        (make_grpo, "nf4"),
        (make_reward, "fp32"),
    ],
)
def test_other_trainers(make, base, load, tmp_path):
    turbo = compare(lambda folder: make(load, base, folder), tmp_path)
    assert all(update.norm() > 0 for name, update in turbo.updates.items() if "lora" in name)
    assert_lora_is_patched(turbo)


# ------------------------------------------------------------------------------------------------ dropout


def with_dropout(load: Load, folder: Path, seed: int, dropout: float = 0.3, **more: Any) -> Trainer:
    """The same weights and order of samples whatever the seed of the draws."""
    peft = get_peft_model(load("fp32"), lora(lora_dropout=dropout))
    settings = {
        "max_steps": 40,
        "optim": "adamw_torch",
        "learning_rate": 2e-3,
        "eval_strategy": "steps",
        "eval_steps": 20,
    }
    trainer = causal_lm(peft, folder, seed=seed, data_seed=0, **settings, **more)

    class Draws(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            torch.manual_seed(args.seed)

    trainer.add_callback(Draws())
    return trainer


def test_dropout_is_drawn_again_and_by_the_seed(load, tmp_path):
    """Turbo may draw other elements than stock, from the same distribution, and the same ones at each run."""

    def run(name: str, seed: int, turbo: bool, **more: Any) -> Run:
        return Run(lambda folder: with_dropout(load, folder, seed, **more), tmp_path / name, turbo=turbo)

    turbo, again, other = (run(f"turbo {i}", seed, True) for i, seed in enumerate((4, 4, 5)))
    recomputed = run(
        "recomputed", 4, True, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    stock = [run(f"stock {seed}", seed, False).logged("loss") for seed in range(4)]
    without = run("without", 4, True, dropout=0.0)
    for name in ("loss", "grad_norm", "eval_loss"):
        assert torch.equal(turbo.logged(name), again.logged(name)), name
        assert torch.equal(turbo.logged(name), recomputed.logged(name)), name
    assert not torch.equal(turbo.logged("loss"), other.logged("loss"))

    # Distances between the curves of any two draws are alike.
    losses = turbo.logged("loss")
    apart = [(a - b).norm().item() for i, a in enumerate(stock) for b in stock[:i]]
    for ours in (losses, other.logged("loss")):
        assert max((ours - theirs).norm().item() for theirs in stock) <= 1.5 * max(apart)
        assert min((ours - theirs).norm().item() for theirs in stock) >= min(apart) / 1.5
    assert (losses - without.logged("loss")).norm() > 0


# ------------------------------------------------------------------------------------------------ bitsandbytes on a CPU


def test_evaluation_may_repack_the_weights(load, tmp_path):
    """On CPUs with AVX512-BF16, bitsandbytes lays 4-bit weights out anew at the first evaluation: turbo answers as
    stock, before and after."""
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("this CPU has no AVX512-BF16")

    def look(turbo: bool) -> list[torch.Tensor]:
        peft = get_peft_model(load("nf4", compute="bfloat16"), lora())
        for module in peft.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = True
        if turbo:
            hf_turbo.patch_model(peft, report=False)
        seen = [answers(peft), answers(peft), peft(input_ids=torch.arange(3, 13)[None]).logits]
        assert any(
            getattr(p.quant_state, "packing_format_for_cpu", False)
            for p in peft.parameters()
            if hasattr(p, "quant_state")
        )
        hf_turbo.disable()
        return seen

    for stock, turbo in zip(look(False), look(True), strict=True):
        assert (stock - turbo).norm() <= 2**-8 * stock.norm()
