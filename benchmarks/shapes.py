"""The shapes that are measured, and the one that is swept; flexmore_kernels/shapes.py has each."""

from __future__ import annotations

from flexmore_kernels.shapes import SHAPES, Shape

__all__ = ["SHAPES", "SWEEP", "SWEPT", "Shape"]

SWEPT = "flexolmo_6x64"
SWEEP = (1, 16, 64, 512, 4096, 16384, 65536)
"""Decode to long prefill: latency of launches, then bytes of weights, then operations."""
