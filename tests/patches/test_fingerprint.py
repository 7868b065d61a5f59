"""Fingerprints recognise a computation, whatever the names, and nothing else."""

from __future__ import annotations

from hf_turbo.patches.fingerprint import fingerprint


def stock(hidden_states, scale=2):
    """Documented."""
    total = hidden_states.sum()
    return hidden_states * scale + total


def renamed(x, factor: int = 3) -> int:
    t: int = x.sum()
    return x * factor + t


def changed(hidden_states, scale=2):
    total = hidden_states.sum()
    return hidden_states * scale - total


def other_attribute(hidden_states, scale=2):
    total = hidden_states.mean()
    return hidden_states * scale + total


def swapped_names(scale, hidden_states):
    total = hidden_states.sum()
    return hidden_states * scale + total


def test_names_annotations_defaults_and_docstrings_do_not_matter():
    assert fingerprint(stock) == fingerprint(renamed)


def test_the_computation_matters():
    assert len({fingerprint(f) for f in (stock, changed, other_attribute, swapped_names)}) == 4


def test_it_does_not_depend_on_the_python_version():
    """A literal: `ast.dump` changed in 3.9, 3.12 and 3.13, the fingerprint must not."""
    assert fingerprint(stock) == "47099be76188"


def test_no_source_no_fingerprint():
    assert fingerprint(len) is None
    assert fingerprint(eval("lambda x: x")) is None
