"""The console script `hf-turbo`."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Entry point of `hf-turbo`; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["launch"]:
        return launch(argv[1:])  # before argparse, which would claim accelerate's options
    parser = argparse.ArgumentParser(prog="hf-turbo", description="Faster Hugging Face fine-tuning, unchanged scripts.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    doctor = commands.add_parser(
        "doctor",
        help="print the environment and check every kernel on this device",
        description="Prints what a report of a problem needs, and checks the numbers of every kernel on this device. "
        "Exit code 1 if something needs attention.",
    )
    doctor.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    add_plan(commands)
    commands.add_parser("launch", help="accelerate launch, with hf_turbo enabled in every process", add_help=False)
    arguments = parser.parse_args(argv)
    return plan(arguments) if arguments.command == "plan" else run_doctor(arguments)


def run_doctor(arguments: argparse.Namespace) -> int:
    """`hf-turbo doctor`."""
    from .doctor import run

    return run(as_json=arguments.json)


def add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the arguments of `hf-turbo plan`."""
    parser = commands.add_parser(
        "plan",
        help="predict the GPU memory of a fine-tuning run, without a GPU",
        description="Predicts the peak GPU memory of a fine-tuning run under hf_turbo, without a GPU and without "
        "loading weights: one process, no padding. Exit code 0 if the run fits, 1 if not, 2 if there is no plan.",
    )
    parser.add_argument("--model", required=True, help="a folder with a config.json, or a model's name on the hub")
    parser.add_argument("--method", required=True, choices=("full", "lora", "qlora"), help="what is trained")
    parser.add_argument("--gpu", required=True, metavar="SIZE", help="memory of the GPU, such as 24GiB")
    parser.add_argument("--batch", type=positive, default=8, help="per_device_train_batch_size (default: 8)")
    parser.add_argument("--length", type=positive, default=1024, help="tokens of a row (default: 1024)")
    parser.add_argument("--rank", type=positive, default=16, help="of the adapters, on all linear layers (default: 16)")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="of the weights; what is float32 is computed in float32 (default: bfloat16)",
    )
    parser.add_argument("--optim", default="adamw_torch_fused", help="as in TrainingArguments (default: %(default)s)")
    parser.add_argument(
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="gradient checkpointing (default: with it)",
    )
    parser.add_argument(
        "--memory",
        choices=("auto", "as_is", "max_speed", "min_memory"),
        default="auto",
        help="hf_turbo's option of this name; min_memory is with checkpointing (default: auto)",
    )
    parser.add_argument(
        "--bf16-weights",
        choices=("as_is", "exact_master", "stochastic_rounding"),
        default="as_is",
        help="hf_turbo's option of this name (default: as_is)",
    )
    parser.add_argument("--optimizer-in-backward", action="store_true", help="hf_turbo's option of this name")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw how memory fills in a step, such as step.png")


def positive(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def plan(arguments: argparse.Namespace) -> int:
    """`hf-turbo plan`."""
    from .plan import Run, run

    settings = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Run)}
    return run(arguments.model, arguments.gpu, settings, as_json=arguments.json, picture=arguments.plot)


def launch(arguments: list[str]) -> int:
    """`accelerate launch ARGUMENTS` with ``HF_TURBO`` set for the workers.

    Options are those of the caller's ``HF_TURBO``, else of the section ``hf_turbo`` of the config file, else defaults.
    """
    from accelerate.commands.config import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command, launch_command_parser

    from .autoload import read_section_of_accelerate_config

    read_section_of_accelerate_config()
    parser = launch_command_parser()
    parser.prog = "hf-turbo launch"
    parser.epilog = "hf_turbo: the same as `accelerate launch`, with hf_turbo enabled in every process."
    args = parser.parse_args(arguments)
    if args.config_file is not None or (os.path.isfile(default_config_file) and not args.cpu):
        load_config_from_file(args.config_file)
    if not os.environ.get("HF_TURBO"):
        os.environ["HF_TURBO"] = "1"
    launch_command(args)
    return 0
