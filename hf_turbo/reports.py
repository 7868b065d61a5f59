"""What was patched, what was not and why: as objects, as JSON, as a table.

Not `report.py`: importing a submodule of that name would hide the function `hf_turbo.report`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from . import __version__

_PACKAGES = ("torch", "triton", "transformers", "accelerate", "trl", "peft", "bitsandbytes")


@dataclass(frozen=True)
class Row:
    """One role of one model.

    Attributes:
        model: class of the model, or the host module a patch acts on.
        role: what the modules do: norms, mlp, rope, loss; or offload, optimizer.
        found, patched: how many there are, how many run a kernel of ours.
        kernel: what runs instead.
        exactness: exact, re-associated, re-drawn or approximate.
        reason: why some or all stay stock; empty where none does.
    """

    model: str
    role: str
    found: int
    patched: int
    kernel: str
    exactness: str
    reason: str = ""


@dataclass
class Report:
    """A live view: rows are added as models are met.

    Attributes:
        live: whether the patches act now.
        options: the TurboConfig in force, as a dict.
        models: rows by model, in the order met.
        process: rows of what is patched once, whatever the models.
        notes: what happened beside patching, e.g. a patch that could not be reverted.
    """

    live: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    models: dict[int, list[Row]] = field(default_factory=dict)
    process: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def rows(self) -> list[Row]:
        """The rows of all models."""
        return [row for rows in self.models.values() for row in rows]

    @property
    def patched(self) -> int:
        """Number of objects that run a kernel of ours."""
        return sum(row.patched for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        return {
            "hf_turbo": __version__,
            "live": self.live,
            "options": self.options,
            "versions": dict(_versions()),
            "rows": [asdict(row) for row in (*self.process, *self.rows)],
            "notes": self.notes,
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def write(self, path: Path) -> None:
        """Writes the JSON, making the folder if need be."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_json() + "\n")

    def __str__(self) -> str:
        """The table as plain text."""
        from rich.console import Console

        console = Console(width=120, color_system=None)
        with console.capture() as capture:
            console.print(self.__rich__())
        return capture.get()

    def __rich__(self) -> Any:
        from rich.table import Table

        state = "on" if self.live else "off"
        table = Table(title=f"hf_turbo {__version__} ({state})", title_justify="left")
        for column in ("model", "role", "patched", "kernel", "exactness", "stock, because"):
            table.add_column(column, overflow="fold")
        for row in (*self.process, *self.rows):
            colour = "green" if row.patched == row.found else "yellow" if row.patched else "dim"
            count = f"[{colour}]{row.patched} / {row.found}[/]"
            table.add_row(row.model, row.role, count, row.kernel, row.exactness, row.reason)
        if not self.rows:
            table.add_row("no model met yet", "", "", "", "", "")
        return table


def _versions() -> Iterator[tuple[str, str]]:
    for package in _PACKAGES:
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
