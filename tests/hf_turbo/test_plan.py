"""`hf-turbo plan` against what was measured on a GPU, and against what is allocated for real on a CPU."""

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_turbo.kernels import linear_cross_entropy
from hf_turbo.kernels.linear_cross_entropy import linear_log_prob
from hf_turbo.patches import kept_layers
from torch import nn
from transformers import AutoConfig, LlamaConfig

import hf_turbo
from hf_turbo import cli, dry_run
from hf_turbo import plan as planning
from hf_turbo.plan import Planner, Run
from hf_turbo.policies import footprint, memory, tiling
from hf_turbo.policies.footprint import Trained, optimizer_bytes
from tests.models import FAMILIES, batch, quantised, switch_on, tiny_model

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from workloads import MODELS, WORKLOADS

pytestmark = pytest.mark.xdist_group("plan")

GIB = 2**30
H100, H200 = round(79.2 * GIB), round(139.8 * GIB)

# Peaks in GiB, of benchmarks/RESULTS.md, and the least tolerance that holds. Without a GPU: all layers recomputed, and
# measured by earlier builds, whose head took a quarter of a GiB more.
MEASURED = [
    ("llama8b-lora", "auto", None, 29.54, 0.02),  # LoRA and QLoRA, first row
    ("llama8b-qlora", "auto", None, 6.56, 0.01),  # LoRA and QLoRA, second row
    ("llama8b-qlora-nockpt", "auto", None, 19.79, 0.02),  # LoRA and QLoRA, third row
    ("llama8b-qlora-32k", "auto", H200, 66.79, 0.01),  # Memory
    ("llama8b-qlora-32k", "min_memory", H200, 9.14, 0.01),
    ("llama1b-full", "auto", H100, 14.89, 0.01),  # Full fine-tuning
    ("qwen3-4b-full", "auto", H100, 30.79, 0.03),
    ("llama8b-full", "auto", H100, 30.24, 0.01),
]


def run_of(workload):
    method = "qlora" if workload.nf4 else "lora" if workload.lora_rank else "full"
    return Run(
        method,
        workload.batch_size,
        workload.median,
        workload.lora_rank,
        optim=workload.optim,
        checkpointing=workload.checkpointing,
    )


def config_of(name):
    return AutoConfig.for_model(**copy.deepcopy(MODELS[name]))


@pytest.fixture(scope="module")
def planners():
    return {name: Planner(config_of(name)) for name in MODELS}


@pytest.fixture
def as_measured(monkeypatch):
    """The build that was measured: the head summed in larger chunks."""
    monkeypatch.setattr(linear_cross_entropy, "_CHUNK_BYTES", {"cuda": 512 << 20})
    monkeypatch.setattr(linear_cross_entropy, "_TIMES_TRAINED", {})
    monkeypatch.setattr(linear_cross_entropy, "_IN_PLACE_BYTES", 1 << 62)


@pytest.mark.parametrize(("name", "choice", "gpu", "measured", "tolerance"), MEASURED)
def test_predicts_what_was_measured(planners, name, choice, gpu, measured, tolerance):
    workload = WORKLOADS[name]
    planner, run = planners[workload.model], dataclasses.replace(run_of(workload), memory=choice)
    peak = planner.footprint(run, planner.layers_kept(run, gpu) if gpu else (0, ())).peak
    if gpu:
        peak += planner.stays_expanded(run, gpu)
    assert peak / GIB == pytest.approx(measured, rel=tolerance)


def test_steps_within_backward_take_what_was_measured(planners, monkeypatch):
    """benchmarks/RESULTS.md, Full fine-tuning: 23.32 GiB, by a build with smaller chunks of the head."""
    monkeypatch.setattr(linear_cross_entropy, "_TIMES_TRAINED", {})
    planner, workload = planners["llama-3.1-8b"], WORKLOADS["llama8b-full"]
    run = dataclasses.replace(run_of(workload), optimizer_in_backward=True)
    assert planner.footprint(run, planner.layers_kept(run, H200)).peak / GIB == pytest.approx(23.32, rel=0.01)


def test_what_bf16_weights_take():
    """Remainders are 2 bytes a weight, and make averages of torch 8 bytes instead of 4."""
    planner = Planner(LlamaConfig(num_hidden_layers=2, vocab_size=1000, hidden_size=512, intermediate_size=1024))
    run = Run("full", 1, 64, optim="adamw_torch")
    weights = sum(each.elements for each in planner.model(run)[1].trained)
    as_is, exact, chance = (
        planner.footprint(dataclasses.replace(run, bf16_weights=choice)).resident
        for choice in ("as_is", "exact_master", "stochastic_rounding")
    )
    assert exact - as_is == 6 * weights
    assert chance == as_is


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"bf16_weights": "exact_master", "dtype": "float32"}, "needs --dtype bfloat16"),
        ({"bf16_weights": "stochastic_rounding", "optim": "lion_8bit"}, "an AdamW"),
        ({"optimizer_in_backward": True, "optim": "lion_8bit"}, "an AdamW or sgd"),
    ],
)
def test_options_that_a_run_could_not_have(options, told):
    with pytest.raises(ValueError, match=told):
        Run("full", 1, 64, **options)


def test_trained_layers_keep_less_than_was_measured():
    """Not the outputs of both norms, of Llama-1B; and no second gradient of the head while the first is rounded."""
    run = run_of(WORKLOADS["llama1b-full"])
    config = config_of("llama-3.2-1b")
    config.num_hidden_layers = 2
    kept, peaks = [], []
    for off in (dry_run._OFF, (*dry_run._OFF, "layers")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dry_run, "_OFF", off)
            planner = Planner(config)
            kept.append(planner.layer_sizes(run)[1] / (run.batch * run.length))
            peaks.append(planner.step(run).peak)
    assert kept[1] - kept[0] == 2 * 2 * config.hidden_size
    head, chunk = config.vocab_size * config.hidden_size, 2 * linear_cross_entropy._CHUNK_BYTES["cuda"]
    assert peaks[0] < sum(kept[:1]) * 2 * run.batch * run.length + 4 * head + chunk + 2**28


def test_long_samples_in_little_memory(planners):
    """Llama-8B with QLoRA."""
    length, most = 32_768, 11
    planner = planners["llama-3.1-8b"]
    run = dataclasses.replace(run_of(WORKLOADS["llama8b-qlora-32k"]), length=length, memory="min_memory")
    assert 0.7 * most < planner.footprint(run).peak / GIB < 0.9 * most
    assert planner.layers_kept(run, H200) == (0, ())
    assert planning._host_bytes(planner, run) == 32 * length * 4096 * 2


def test_tiles_take_less(planners, monkeypatch):
    planner = planners["llama-3.1-8b"]
    run = dataclasses.replace(run_of(WORKLOADS["llama8b-qlora-32k"]), memory="as_is")
    tiled = planner.footprint(run).peak
    planner._steps.clear()
    monkeypatch.setattr(tiling, "LONG", 10**6)
    assert planner.footprint(run).peak - tiled > 2.5 * GIB
    planner._steps.clear()


def test_little_memory_checkpoints():
    run = Run("full", 1, 64, checkpointing=False, memory="min_memory")
    assert run.checkpointing


@pytest.mark.parametrize(("trained", "measured"), [(False, 0.61), (True, 3.06)])
def test_head_and_loss_take_what_was_measured(as_measured, trained, measured):
    """benchmarks/RESULTS.md, Kernels, linear_ce 4096x128256x4096: extra GiB beyond the inputs."""
    tensors = [torch.empty(n, 4096, dtype=torch.bfloat16, device="meta") for n in (4096, 128_256)]
    hidden, weight = tensors[0].requires_grad_(), tensors[1].requires_grad_(trained)
    ledger = dry_run.Ledger()
    ledger.own(tensors)
    with ledger:
        targets = torch.empty(4096, dtype=torch.int64, device="meta")
        linear_log_prob(hidden, weight, targets, uniform=True)[0].sum().backward()
    assert ledger.peak / GIB == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("mixtral", "qwen3-moe")])
def test_layers_keep_what_a_run_measures_on_a_cpu(family):
    """The sizes that a run decides by: those of kept_layers.py, measured where layers are recomputed for real.

    Rows are shorter than sliding windows, for which a CPU makes masks.
    """
    model, inputs = switch_on(tiny_model(family)), batch(rows=3, length=7, masked=False)
    del inputs["attention_mask"]
    config = copy.deepcopy(model.config)
    with hf_turbo.session(metrics=False, report=False, padding=False):
        hf_turbo.patch_model(model, metrics=False, report=False, padding=False)
        model(**inputs).loss.backward()
        layers = model.base_model.layers
        stack = kept_layers.PLACES[layers[0]][0]
        measured, attention = (
            [each.bytes for each in stack._measured],
            [each and each.bytes for each in stack._attention],
        )
    predicted = Planner(config).layer_costs(Run("full", 3, 7, dtype="float32"))
    assert [each.whole for each in predicted] == pytest.approx(measured, rel=0.02)
    assert [each.attention for each in predicted] == attention


def test_recomputing_and_offloading_take_less():
    planner = Planner(LlamaConfig(num_hidden_layers=6, vocab_size=1000, hidden_size=512, intermediate_size=1024))
    model, _ = planner.model(Run("full", 4, 2048))
    peaks = []
    with dry_run.patched(model):
        for recomputed, offloaded in ((None, False), (3, False), (6, False), (6, True)):
            peaks.append(dry_run.step(model, 4, 2048, recomputed=recomputed, offloaded=offloaded))
    assert peaks[0].peak > peaks[1].peak > peaks[2].peak
    inputs = 4 * 2048 * 512 * 2
    assert peaks[2].parts["forward"] - peaks[3].parts["forward"] >= 2 * inputs
    assert peaks[1].kept[:3] == [0, 0, 0]
    assert peaks[1].kept[3:] == peaks[0].kept[3:]


def test_outputs_of_attention_take_their_bytes():
    """Those of the layer that is recomputed first are handed out while its other tensors are there: the peak."""
    planner = Planner(LlamaConfig(num_hidden_layers=6, vocab_size=1000, hidden_size=512, intermediate_size=1024))
    run = Run("lora", 4, 2048)
    size = 4 * 2048 * (512 * 2 + 4 * 32)  # log-sum-exp of 32 heads of 16
    assert [each.attention for each in planner.layer_costs(run)] == [size] * 6
    of_none, of_four, of_all = (planner.step(run, (0, kept)).peak for kept in ((), (0, 1, 2, 3), tuple(range(6))))
    assert of_four - of_none == pytest.approx(4 * size, rel=0.01)
    assert of_all - of_four == pytest.approx(size, rel=0.01)  # the last layer's are among what it makes anyway
    whole, attended = planner.layers_kept(run, round(1.6 * GIB))
    assert whole + len(attended) <= 6


def test_packed_weights_take_what_bitsandbytes_makes_of_them():
    pytest.importorskip("bitsandbytes")
    config = tiny_model("llama").config
    real, planned = quantised(tiny_model("llama"), "nf4-double"), dry_run.build(config, "qlora", 4, torch.float32)
    expected = 0
    for module in real.modules():
        if hasattr(getattr(module, "weight", None), "quant_state"):
            expected += sum(dry_run._allocated(each) for each in [module.weight, *dry_run._scales(module.weight)])
    head = real.get_output_embeddings()
    rest = [p for p in real.parameters() if p.ndim == 1 or p is head.weight or p is real.get_input_embeddings().weight]
    expected += sum(map(dry_run._allocated, [*rest, *real.buffers()]))
    assert dry_run.sizes_of(planned).weights == expected


def states_of(optimizer):
    """Bytes of its tensors, but for step counters and the tables that all parameters share."""
    tensors = {key: value for state in optimizer.state.values() for key, value in ((id(v), v) for v in state.values())}
    tables = {id(state.get(name)) for state in optimizer.state.values() for name in ("qmap1", "qmap2")}
    return sum(
        each.nbytes for key, each in tensors.items() if torch.is_tensor(each) and each.ndim and key not in tables
    )


@pytest.mark.parametrize("name", ["adamw_torch", "rmsprop", "adagrad", "adamw_8bit", "paged_adamw_32bit", "lion_8bit"])
def test_optimizer_states_take_what_the_optimizer_makes(name):
    parameters = [nn.Parameter(torch.randn(n)) for n in (100, 5000, 120_001)]
    if "_8bit" in name or "_32bit" in name:
        optim = pytest.importorskip("bitsandbytes.optim")
        kind = {"adamw_8bit": "AdamW8bit", "paged_adamw_32bit": "AdamW32bit", "lion_8bit": "Lion8bit"}[name]
        optimizer = getattr(optim, kind)(parameters)
        optimizer.check_overrides()
        for index, parameter in enumerate(parameters):
            optimizer.init_state(optimizer.param_groups[0], parameter, 0, index)
    else:
        kind = {"adamw_torch": "AdamW", "rmsprop": "RMSprop", "adagrad": "Adagrad"}[name]
        optimizer = getattr(torch.optim, kind)(parameters)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    device, paged = optimizer_bytes(name, [Trained(p.numel(), 4, False) for p in parameters])
    assert device + paged == states_of(optimizer)
    assert (paged > 0) == name.startswith("paged")


def test_states_of_embeddings_are_never_8_bit():
    assert optimizer_bytes("adamw_8bit", [Trained(10_000, 2, True)]) == (80_000, 0)
    assert optimizer_bytes("adamw_8bit", [Trained(10_240, 2, False)]) == (2 * (10_240 + 4 * 40), 0)


def test_unknown_optimizer():
    with pytest.raises(ValueError, match="--optim lomo are not known: use one of adamw_torch"):
        optimizer_bytes("lomo", [])


def test_layers_kept_leave_the_optimizer_its_room():
    """A run measures the rest of a pass from begin to begin, so that states made in the first step are among it."""
    whole = footprint.Footprint(resident=10 * GIB, gradients=2 * GIB, states=4 * GIB, in_pass=3 * GIB)
    layers = [memory.Layer(GIB, None, 1.0, 0.0)] * 20
    assert footprint.layers_kept(whole, layers, 100 * GIB) == (20, ())
    free = 20 * GIB - footprint.CONTEXT - 10 * GIB - footprint.WORKSPACES
    assert (free - 1.2 * (6 * GIB + footprint.WORKSPACES)) // GIB == 2
    assert footprint.layers_kept(whole, layers, 20 * GIB) == (2, ())
    assert footprint.layers_kept(whole, layers, 12 * GIB) == (0, ())
    layers = [memory.Layer(GIB, GIB / 16, 1.0, 0.75)] * 20
    assert footprint.layers_kept(whole, layers, 20 * GIB) == (0, tuple(range(20)))


@pytest.mark.parametrize("limit", [0, 63, 64, 1000, 4096, 10_000])
def test_longest_context(limit):
    found = footprint.longest(lambda length: length <= limit, 8192)
    assert found == limit // 64 * 64 if limit < 8192 else found == 8192


@pytest.fixture
def folder(tmp_path):
    config = {**MODELS["llama-3.2-1b"], "num_hidden_layers": 2, "max_position_embeddings": 4096}
    AutoConfig.for_model(**config).save_pretrained(tmp_path)
    return tmp_path


def run_plan(*arguments):
    return cli.main(["plan", *map(str, arguments)])


def test_json_adds_up(folder, capsys):
    options = ("--model", folder, "--method", "lora", "--batch", 2, "--length", 512, "--optim", "adamw_8bit", "--json")
    assert run_plan(*options, "--gpu", "80GiB") == 0
    plan = json.loads(capsys.readouterr().out)
    assert sum(plan["peak_bytes_by_part"].values()) == pytest.approx(plan["peak_bytes"], abs=2**20)
    assert plan["needed_bytes"] == plan["peak_bytes"] + plan["allowance_bytes"]
    assert plan["layers"] == plan["layers_not_recomputed"] == 2
    assert plan["layers_recomputed_without_attention"] == 0
    assert plan["longest_context"] == 4096
    assert plan["advice"] == []


def test_table_and_advice(folder, capsys):
    options = ("--model", folder / "config.json", "--method", "full", "--batch", 4, "--length", 2048)
    assert run_plan(*options, "--no-checkpointing", "--gpu", "2GiB") == 1
    shown = capsys.readouterr().out
    assert "LlamaForCausalLM: full, 4 x 2,048 tokens, bfloat16, adamw_torch_fused, without checkpointing" in shown
    assert "It does not fit on a GPU of 2.00 GiB." in shown
    advice = shown.partition("To make it fit")[2]
    assert "gradient_checkpointing=True" in advice
    assert "--method lora" in advice


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "no/such-folder/x", "--gpu", "24GiB"), "give a folder with a config.json"),
        (("--model", None, "--gpu", "lots"), "lots"),
        (("--model", None, "--gpu", "24GiB", "--optim", "lomo"), "--optim lomo are not known"),
    ],
)
def test_errors_say_what_to_do(folder, arguments, message, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    given = [str(folder) if each is None else each for each in arguments]
    assert run_plan("--method", "full", *given) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_picture_of_a_step(folder, tmp_path, capsys, monkeypatch):
    """Areas that add up to the peak of the table."""
    pytest.importorskip("matplotlib")
    drawn, draw = [], planning.draw

    def noted(path, title, resident, timeline, gpu_bytes):
        drawn.append((resident, timeline))
        draw(path, title, resident, timeline, gpu_bytes)

    monkeypatch.setattr(planning, "draw", noted)
    arguments = ("--model", folder, "--method", "lora", "--gpu", "80GiB", "--length", 512, "--json", "--plot")
    assert run_plan(*arguments, tmp_path / "step.png") == 0
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
    ((resident, timeline),) = drawn
    plan = json.loads(capsys.readouterr().out)
    most = max(sum(each.values()) for each in timeline)
    assert sum(resident.values()) + most == plan["peak_bytes"]
    assert timeline[-1]["gradients"] > 0.9 * sum(timeline[-1].values())  # the inputs are there, too
    assert run_plan(*arguments, tmp_path / "no folder" / "step.png") == 2
    assert "no folder" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run_plan(*arguments, tmp_path / "other.png") == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(dry_run.Unsupported, match="--method lora needs peft: pip install peft"):
        dry_run.build(tiny_model("llama").config, "lora", 4, torch.float32)


def test_experts_with_adapters_are_refused():
    with pytest.raises(dry_run.Unsupported, match="mixture of experts"):
        dry_run.build(tiny_model("mixtral").config, "lora", 4, torch.float32)


def test_encoders_are_refused():
    from transformers import ViTConfig

    with pytest.raises(dry_run.Unsupported, match="no causal language model"):
        dry_run.build(ViTConfig(), "full", 4, torch.float32)


def test_leaves_nothing_behind(folder, capsys):
    run_plan("--model", folder, "--method", "full", "--gpu", "80GiB", "--length", 256)
    assert not hf_turbo.report().live
    assert not torch.is_autocast_enabled("cuda")


def test_the_command_line_is_light():
    code = (
        "import sys, hf_turbo.cli as c; c.add_plan; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_sizes_are_parsed_as_those_of_memory_budget():
    assert planning.memory.budget_bytes("24GiB", 0) == 24 * GIB
