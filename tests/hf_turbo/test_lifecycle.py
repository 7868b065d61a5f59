"""enable, disable, session, patch_model: idempotent, reversible by identity, in any order, from threads."""

from __future__ import annotations

import sys
import threading
import types

import pytest
import torch
from accelerate.accelerator import Accelerator
from transformers import Trainer, TrainingArguments
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

import hf_turbo
from tests.models import batch, loss_and_gradients, tiny_model


def snapshot(*models) -> dict[str, object]:
    """Everything hf_turbo may touch, by identity."""
    import trl.trainer.utils

    state: dict[str, object] = {}
    for owner in (
        Trainer,
        Accelerator,
        modeling_llama,
        modeling_qwen3,
        trl.trainer.utils,
        torch.nn.functional,
        torch.nn.Linear,
        torch.nn.Module,
    ):
        state.update({f"{owner.__name__}.{name}": value for name, value in vars(owner).items()})
    for i, model in enumerate(models):
        for name, module in model.named_modules():
            state[f"{i}.{name}.class"] = type(module)
            state.update({f"{i}.{name}.{key}": value for key, value in module.__dict__.items() if key == "forward"})
            state[f"{i}.{name}.hooks"] = (len(module._forward_hooks), len(module._forward_pre_hooks))
    state["meta_path"] = tuple(map(id, sys.meta_path))
    return state


def assert_same(before: dict[str, object], after: dict[str, object]) -> None:
    assert before.keys() == after.keys()
    changed = [k for k, value in before.items() if value is not after[k] and value != after[k]]
    assert changed == []
    replaced = [k for k, value in before.items() if callable(value) and value is not after[k]]
    assert replaced == []


def rows_of(*roles: str) -> dict[str, object]:
    """The latest row of each role."""
    rows = {row.role: row for row in hf_turbo.report().rows}
    return {role: rows[role] for role in roles or ("norms", "mlp", "layers", "rope", "loss")}


def trainer(tmp_path, model, **kwargs):
    arguments = {
        "output_dir": str(tmp_path),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "learning_rate": 1e-3,
    }
    data = [{key: value[0] for key, value in batch(rows=1, seed=i, masked=False).items()} for i in range(12)]
    options = {key: kwargs.pop(key) for key in list(kwargs) if hasattr(TrainingArguments, key)}
    return Trainer(model=model, args=TrainingArguments(**{**arguments, **options}), train_dataset=data, **kwargs)


def test_disable_restores_everything_by_identity(tmp_path):
    models = tiny_model("llama"), tiny_model("qwen3")
    before = snapshot(*models)
    hf_turbo.enable()
    for model in models:
        hf_turbo.patch_model(model)
    assert hf_turbo.report().patched > 0
    during = snapshot(*models)
    assert during["Trainer.train"] is not before["Trainer.train"]
    assert during["0.model.norm.class"] is not before["0.model.norm.class"]
    hf_turbo.disable()
    assert_same(before, snapshot(*models))
    assert hf_turbo.report().notes == []
    assert not hf_turbo.report().live


def test_a_disabled_model_trains_exactly_as_stock(tmp_path):
    model, twin = tiny_model("qwen3"), tiny_model("qwen3")
    hf_turbo.patch_model(model)
    loss_and_gradients(model, batch())
    hf_turbo.disable()
    loss, gradients = loss_and_gradients(model, batch())
    expected_loss, expected = loss_and_gradients(twin, batch())
    assert torch.equal(loss, expected_loss)
    for name, gradient in expected.items():
        assert torch.equal(gradients[name], gradient), name


def test_enable_twice_is_a_no_op():
    first = hf_turbo.enable()
    state = snapshot()
    assert hf_turbo.enable() is first
    assert_same(state, snapshot())


def test_options_may_change_until_a_model_is_patched():
    """A script with options of its own, run under HF_TURBO=1."""
    report = hf_turbo.enable()
    assert hf_turbo.enable(rope=False) is report
    assert report.options["rope"] is False
    hf_turbo.patch_model(tiny_model("llama"))
    assert hf_turbo.enable() is report
    with pytest.raises(RuntimeError, match="disable"):
        hf_turbo.enable(rope=True)


def test_patch_model_twice_patches_once():
    model = tiny_model("llama")
    first = [(row.role, row.patched) for row in hf_turbo.patch_model(model).rows]
    classes = [type(module) for module in model.modules()]
    assert [(row.role, row.patched) for row in hf_turbo.patch_model(model).rows] == first
    assert [type(module) for module in model.modules()] == classes


def test_enable_from_many_threads():
    before = snapshot()
    reports = []
    threads = [threading.Thread(target=lambda: reports.append(hf_turbo.enable())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(report is reports[0] for report in reports)
    hf_turbo.disable()
    assert_same(before, snapshot())


def test_session():
    before = snapshot()
    with hf_turbo.session(norms=False) as report:
        assert report.live
        assert report.options["norms"] is False
        with hf_turbo.session():
            pass
        assert report.live, "an inner session changes nothing"
    assert not report.live
    assert_same(before, snapshot())


def test_session_ends_on_an_error():
    with pytest.raises(ZeroDivisionError), hf_turbo.session():
        raise ZeroDivisionError
    assert not hf_turbo.report().live


@pytest.mark.parametrize("when", ["before the model", "after the model", "after the trainer"])
def test_coverage_does_not_depend_on_the_order(tmp_path, when):
    if when == "before the model":
        hf_turbo.enable()
    model = tiny_model("llama")
    if when == "after the model":
        hf_turbo.enable()
    runner = trainer(tmp_path, model)
    hf_turbo.enable()
    runner.train()
    rows = {role: (row.patched, row.found) for role, row in rows_of().items()}
    assert rows == {"norms": (5, 5), "mlp": (2, 2), "layers": (2, 2), "rope": (2, 2), "loss": (1, 1)}


def test_trainer_run_is_as_stock_and_leaves_a_report(tmp_path):
    stock = trainer(tmp_path / "stock", tiny_model("llama"))
    stock.train()
    hf_turbo.enable()
    turbo = trainer(tmp_path / "turbo", tiny_model("llama"))
    turbo.train()
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (stock, turbo)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    log = turbo.state.log_history[0]
    assert log["turbo/tokens_per_second"] > 0
    assert log["turbo/peak_memory_gib"] > 0
    assert set(stock.state.log_history[0]) <= set(log), "no metric is lost or renamed"
    assert (tmp_path / "turbo" / "hf_turbo_report.json").exists()
    assert not (tmp_path / "stock" / "hf_turbo_report.json").exists()


def test_callback_acts_for_its_trainer_only(tmp_path):
    before = snapshot()
    carrier_model, other_model = tiny_model("llama"), tiny_model("llama")
    carrier = trainer(tmp_path / "a", carrier_model, callbacks=[hf_turbo.TurboCallback()])
    other = trainer(tmp_path / "b", other_model)
    last = hf_turbo.report()
    other.train()
    assert hf_turbo.report() is last
    carrier.train()
    report = hf_turbo.report()
    assert report.patched == 13
    assert not report.live, "all is put back when train() ends"
    assert type(carrier_model.model.norm) is modeling_llama.LlamaRMSNorm
    assert "turbo/tokens_per_second" in carrier.state.log_history[0]
    assert "turbo/tokens_per_second" not in other.state.log_history[0]
    hf_turbo.disable()
    del before["meta_path"]
    after = snapshot()
    del after["meta_path"]
    assert_same(before, after)


def test_callback_puts_back_after_an_error(tmp_path):
    model = tiny_model("llama")
    runner = trainer(tmp_path, model, callbacks=[hf_turbo.TurboCallback()])
    runner.train_dataset = [{"input_ids": torch.tensor([1, 2, 3]), "labels": torch.tensor([1, 2, 9999])}] * 8
    with pytest.raises(IndexError):
        runner.train()
    assert type(model.model.norm) is modeling_llama.LlamaRMSNorm
    assert not hf_turbo.report().live


def test_model_init_is_patched(tmp_path):
    hf_turbo.enable()
    runner = trainer(tmp_path, None, model_init=lambda: tiny_model("llama"))
    runner.train()
    assert [row.patched for row in rows_of().values()] == [5, 2, 2, 2, 1]
    assert type(runner.model.model.norm) is not modeling_llama.LlamaRMSNorm


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"label_smoothing_factor": 0.1}, "label smoothing"),
        (
            {"compute_loss_func": lambda outputs, labels, num_items_in_batch=None: outputs.logits.float().mean()},
            "compute_loss_func",
        ),
        ({"use_liger_kernel": True}, "Liger"),
    ],
)
def test_losses_that_need_logits_stay_stock(tmp_path, options, reason):
    runner = trainer(tmp_path, tiny_model("llama"), **{k: v for k, v in options.items() if k != "use_liger_kernel"})
    runner.args.use_liger_kernel = options.get("use_liger_kernel", False)
    hf_turbo.enable()
    if reason == "Liger":
        with pytest.raises(ImportError):
            runner.train()
    else:
        runner.train()
    row = next(row for row in hf_turbo.report().rows if row.role == "loss")
    assert row.patched == 0
    assert reason in row.reason


def test_overridden_compute_loss_stays_stock(tmp_path):
    class Custom(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            assert type(outputs.logits) is torch.Tensor
            return outputs.logits.float().pow(2).mean()

    runner = trainer(tmp_path, tiny_model("llama"))
    custom = Custom(model=runner.model, args=runner.args, train_dataset=runner.train_dataset)
    hf_turbo.enable()
    custom.train()
    row = next(row for row in hf_turbo.report().rows if row.role == "loss")
    assert row.reason.startswith("compute_loss is overridden")


def test_accelerate_loop_is_patched_at_prepare():
    model = tiny_model("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hf_turbo.enable()
    prepared, optimizer = Accelerator(cpu=True).prepare(model, optimizer)
    rows = rows_of("norms", "mlp", "layers", "rope", "loss", "optimizer")
    assert [row.patched for row in rows.values()] == [5, 2, 2, 2, 0, 0]
    assert "after the step" in rows["loss"].reason
    assert "SGD" in rows["optimizer"].model
    prepared(**batch()).loss.backward()


def test_accelerate_loop_fuses_the_loss_by_name():
    hf_turbo.enable(loss=True)
    model = Accelerator(cpu=True).prepare(tiny_model("llama"))
    assert rows_of()["loss"].patched == 1
    assert type(model(**batch()).logits).__name__ == "LazyLogits"


def test_a_later_conflict_undoes_the_loss_patch(tmp_path):
    """A second trainer of the same model, whose loss reads the logits."""

    class Custom(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            assert type(outputs.logits) is torch.Tensor
            return outputs.loss

    hf_turbo.enable()
    first = trainer(tmp_path, tiny_model("llama"))
    first.train()
    assert rows_of()["loss"].patched == 1
    Custom(model=first.model, args=first.args, train_dataset=first.train_dataset).train()
    assert rows_of()["loss"].patched == 0


def test_metrics_leave_out_what_they_cannot_know():
    from hf_turbo.metrics import flops_per_pair, flops_per_token

    model = tiny_model("llama")
    assert flops_per_pair(model) == 12 * 4 * 16 * 2
    by_stage = types.SimpleNamespace(num_attention_heads=(2, 4), num_hidden_layers=2, hidden_size=8)
    by_stage.get_text_config = lambda: by_stage
    model.config = by_stage
    assert flops_per_pair(model) is None
    bare = torch.nn.Linear(3, 5)
    bare.config = {"hidden_size": 3}
    assert flops_per_pair(bare) is None
    assert flops_per_token(bare) == 3 * 5 * 6


def test_asked_for_by_name_and_cannot_be_had_raises():
    with pytest.raises(RuntimeError, match=r"mlp=True .* no such part"):
        hf_turbo.patch_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), mlp=True)


def test_unsupported_model_class_stays_stock():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    report = hf_turbo.patch_model(model)
    assert report.patched == 0
    assert model(torch.randn(2, 4)).shape == (2, 4)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        hf_turbo.patch_model("llama")


def test_zero_length_dataset_is_as_stock(tmp_path):
    def run():
        runner = trainer(tmp_path, tiny_model("llama"))
        runner.train_dataset = []
        try:
            return runner.train().global_step
        except Exception as error:
            return type(error), str(error)

    stock = run()
    hf_turbo.enable()
    assert run() == stock


def test_report_table_and_json():
    import json

    report = hf_turbo.patch_model(tiny_model("llama"), rope=False)
    data = json.loads(report.to_json())
    assert {"hf_turbo", "live", "options", "versions", "rows", "notes"} == set(data)
    rope = next(row for row in data["rows"] if row["role"] == "rope")
    assert rope["patched"] == 0
    assert rope["found"] == 2
    assert rope["reason"] == "switched off: rope=False"
    assert "5 / 5" in str(report)
    assert "re-associated" in str(report)
