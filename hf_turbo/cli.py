"""The console script `hf-turbo`."""

from __future__ import annotations

import argparse
import os
import sys


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
    commands.add_parser("launch", help="accelerate launch, with hf_turbo enabled in every process", add_help=False)
    arguments = parser.parse_args(argv)

    from .doctor import run

    return run(as_json=arguments.json)


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
