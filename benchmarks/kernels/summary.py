"""Every kernel case once, quickly: exactness at a medium shape, then one table of times, and JSON.

    python benchmarks/kernels/summary.py [--json FILE] [--only rope,glu] [--tiny]

--tiny is a dry run of small shapes, for machines without a GPU. Exits with 1 if a kernel is less exact than stock.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import conftest
import torch


def benchmark_modules(only: str | None) -> list[ModuleType]:
    """The bench_*.py beside this file that list their `cases` and `checks`."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("bench_*.py"))
    if only:
        names = [name for name in names if name.removeprefix("bench_") in only.split(",")]
    return [module for module in map(importlib.import_module, names) if hasattr(module, "checks")]


def failed_checks(modules: list[ModuleType], device: torch.device, tiny: bool) -> list[str]:
    """One line for each check that is less exact than stock."""
    failures, count = [], 0
    for case in (case for module in modules for case in module.checks(tiny)):
        count += 1
        try:
            case.check(device)
        except AssertionError as error:
            failures.append(f"{case}: {error}")
    print(f"as exact as stock against float64: {count - len(failures)} of {count} checks", flush=True)
    for failure in failures:
        print("  " + failure, flush=True)
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--only", help="ops, by the names of their files, with commas between them")
    parser.add_argument("--tiny", action="store_true", help="small shapes")
    arguments = parser.parse_args()

    start, device = time.perf_counter(), conftest.default_device()
    modules = benchmark_modules(arguments.only)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    copy, matrix = conftest.copy_bandwidth(device), conftest.matrix_speed(device)
    print(f"{name}, torch {torch.__version__}: copy {copy * 1e-9:.0f} GB/s, product {matrix * 1e-12:.1f} TFLOP/s")
    failures = failed_checks(modules, device, arguments.tiny)

    print(conftest.Result.HEADER, flush=True)
    results = []
    for case in (case for module in modules for case in module.cases(arguments.tiny)):
        results.append(conftest.measure(case, device, calls=10, repetitions=5))
        print(results[-1], flush=True)
    print(f"{len(results)} cases in {time.perf_counter() - start:.0f} s")
    if arguments.json:
        figures = {
            "device": name,
            "torch": torch.__version__,
            "copy_gb_per_s": copy * 1e-9,
            "product_tflop_per_s": matrix * 1e-12,
            "failed_checks": failures,
            "results": [asdict(result) for result in results],
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
