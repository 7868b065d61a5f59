"""benchmarks/demo.py on a tiny model on the CPU: what it reports, and that it tells agreement from disagreement."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("trl")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parent.parent
CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + ' <eos> ' }}{% endfor %}"


def load(path: Path) -> ModuleType:
    """A script as a module, under its own name."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


demo = load(ROOT / "benchmarks" / "demo.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer, and tiny dialogues."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    words = ["<pad>", "<eos>", "<unk>", "user", "assistant", *(f"w{i}" for i in range(59))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder / "model")
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    dialogues = [
        [
            {
                "role": ("user", "assistant")[turn % 2],
                "content": " ".join(f"w{(i * turn + k) % 59}" for k in range(4 + i)),
            }
            for turn in range(4)
        ]
        for i in range(24)
    ]
    lines = "".join(json.dumps({"messages": messages}) + "\n" for messages in dialogues)
    (folder / "dialogues.jsonl").write_text(lines)
    return folder


@pytest.fixture
def tiny(folder: Path) -> list[str]:
    """Arguments that make the demo train the tiny model."""
    return ["--cpu", "--steps", "5", "--model", str(folder / "model"), "--dataset", str(folder / "dialogues.jsonl")]


@pytest.mark.parametrize(
    ("script", "saved"), [("trainer_full.py", "model.safetensors"), ("sft_lora.py", "adapter_model.safetensors")]
)
def test_examples_run_alone(script: str, saved: str, folder: Path, tmp_path: Path) -> None:
    """And sft_qlora.py does in a test below."""
    arguments = ["--model", folder / "model", "--dataset", folder / "dialogues.jsonl", "--output-dir", tmp_path / "out"]
    sizes = ["--cpu", "--dtype", "float32", "--max-steps", "2", "--batch-size", "2", "--max-length", "32"]
    command = [sys.executable, str(ROOT / "examples" / script), *map(str, arguments), *sizes]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "huggingface")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert sum("loss" in entry for entry in history) == 2
    assert (tmp_path / "out" / saved).exists()


# Leaves what the run before left, one loss a line.
REPLAY = """
import json, pathlib, shutil
for file in (pathlib.Path.cwd().parent / "stock").glob("*.json"):
    shutil.copy(file, file.name)
for log in json.loads(pathlib.Path("trainer_state.json").read_text())["log_history"]:
    if "loss" in log:
        print({"loss": str(log["loss"])})
"""


def test_two_equal_runs_agree_and_are_reported(tiny: list[str], tmp_path: Path) -> None:
    """QLoRA, against its replay: in 4 bits, and with the tolerance of its bf16 adapters."""
    pytest.importorskip("bitsandbytes")
    script = ROOT / "examples" / "sft_qlora.py"
    launchers = {"stock": demo.launchers_of(script)["stock"], "hf_turbo": (sys.executable, "-c", REPLAY)}
    assert demo.main([*tiny, "--script", str(script), "--folder", str(tmp_path)], launchers) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["script"] == "sft_qlora.py"
    assert report["agree"]
    assert report["largest_difference"] == 0.0
    for run in report["runs"].values():
        assert len(run["losses"]) == 5
        assert len(run["step_ms"]) == 4
        assert run["tokens_per_second"] > 0
        assert run["memory_gib"] > 0
    assert demo.adapters_dtype(tmp_path / "stock") == "bfloat16"
    assert report["tolerance"] > demo.tolerance("float32", 1, "float32")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_each_script_has_two_launchers_and_the_makefile_knows_both() -> None:
    for script in (ROOT / "examples" / "sft_lora.py", ROOT / "examples" / "sft_qlora.py"):
        launchers = demo.launchers_of(script)
        assert list(launchers) == ["stock", "hf_turbo"]
        assert launchers["hf_turbo"] == (sys.executable, "-m", "hf_turbo", str(script))
        assert "hf_turbo" not in script.read_text()
    recipe = subprocess.run(["make", "-n", "demo-qlora"], cwd=ROOT, capture_output=True, text=True).stdout
    assert "benchmarks/demo.py --script examples/sft_qlora.py --folder demo-qlora" in recipe


# Leaves what the demo reads of a script, which needs no training.
PRETENDER = """
import json, pathlib, sys
folder, losses = pathlib.Path(sys.argv[sys.argv.index("--output-dir") + 1]), [float(each) for each in sys.argv[1:6]]
for step, loss in enumerate(losses, 1):
    print({"loss": str(loss)})
logs = [{"loss": loss, "num_tokens": 10.0 * step} for step, loss in enumerate(losses, 1)]
(folder / "trainer_state.json").write_text(json.dumps({"log_history": logs}))
header = b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
(folder / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
(folder / "train_results.json").write_text(json.dumps({"train_runtime": 1.0}))
row = {"model": "M", "role": "norms", "found": 1, "patched": 1, "kernel": "", "exactness": "", "reason": ""}
(folder / "hf_turbo_report.json").write_text(json.dumps({"rows": [row], "notes": []}))
"""


def test_different_losses_fail_the_demo(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def pretend(*losses: str) -> tuple[str, ...]:
        return (sys.executable, "-c", PRETENDER, *losses)

    launchers = {"stock": pretend("5", "4", "3", "2", "1"), "hf_turbo": pretend("5", "4", "3", "2", "1.0001")}
    assert demo.main([*tiny, "--folder", str(tmp_path)], launchers) == 1
    assert "disagree" in capsys.readouterr().out
    assert not json.loads((tmp_path / "report.json").read_text())["agree"]
    launchers["hf_turbo"] = pretend("5", "4", "3", "2", "1.0000001")
    assert demo.main([*tiny, "--folder", str(tmp_path)], launchers) == 0
    assert json.loads((tmp_path / "report.json").read_text())["agree"]


def test_a_failing_script_is_told(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launchers = {"stock": (sys.executable, "-c", "import sys; sys.exit(f'no-such-option {sys.argv}')")}
    assert demo.main([*tiny, "--folder", str(tmp_path)], launchers) == 1
    assert "no-such-option" in capsys.readouterr().out


def test_tolerance_is_a_rounding_error() -> None:
    def tolerance(dtype: str, tokens: int, adapters: str = "float32") -> float:
        return demo.tolerance(dtype, tokens, adapters)

    assert tolerance("float32", 500) < tolerance("float32", 500, "bfloat16") < 3e-5
    assert tolerance("bfloat16", 400) == pytest.approx(2 * tolerance("bfloat16", 1600))
    assert tolerance("bfloat16", 4096) == tolerance("bfloat16", 4096, "bfloat16") < 2e-3


def test_nothing_patched_is_no_demo(tmp_path: Path) -> None:
    with pytest.raises(demo.DemoError, match="patched nothing"):
        demo.patched(tmp_path)
    row = {"role": "norms", "found": 2, "patched": 0}
    (tmp_path / "hf_turbo_report.json").write_text(json.dumps({"rows": [row], "notes": []}))
    with pytest.raises(demo.DemoError, match="patched nothing"):
        demo.patched(tmp_path)
    report = {"rows": [{**row, "patched": 1}], "notes": ["padding: 1"]}
    (tmp_path / "hf_turbo_report.json").write_text(json.dumps(report))
    assert demo.patched(tmp_path) == (report["rows"], report["notes"])


@pytest.mark.parametrize("other", [[1.0, float("nan")], [1.0]])
def test_a_missing_or_broken_loss_is_infinitely_far(other: list[float]) -> None:
    def run(losses: list[float]) -> object:
        return demo.Run(losses=losses, step_ms=[], tokens=[], memory_gib=0.0, train_seconds=0.0)

    assert max(demo.differences(run([1.0, 2.0]), run(other))) == float("inf")


def test_dialogues_hold_roles_and_text_alone(tmp_path: Path) -> None:
    pytest.importorskip("chitchat_dataset")
    path = tmp_path / "dialogues.jsonl"
    demo.prepare_dialogues(path, count=16)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 16
    for row in rows:
        assert set(row) == {"messages"}
        assert len(row["messages"]) >= 4
        assert all(set(message) == {"role", "content"} and message["content"] for message in row["messages"])
        assert [message["role"] for message in row["messages"][:3]] == ["user", "assistant", "user"]
