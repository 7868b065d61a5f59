"""Decisions: numbers in, decision out. Nothing here changes, or looks at, a model or a device."""
