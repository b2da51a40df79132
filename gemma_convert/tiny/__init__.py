"""Tiny random Gemma 4 checkpoints in the Hugging Face layout, made without torch."""

from gemma_convert.tiny.checkpoint import TinyReport, make_tiny

__all__ = ["TinyReport", "make_tiny"]
