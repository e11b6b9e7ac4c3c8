"""Exports are made from the same checkpoints that are read in the checkpoint tests."""

from __future__ import annotations

from tests.unit.checkpoint.conftest import model, run, write_checkpoint

__all__ = ["model", "run", "write_checkpoint"]
