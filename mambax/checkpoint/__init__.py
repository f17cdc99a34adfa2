"""Checkpoints: where files come from, what layouts exist, reading and writing."""

from mambax.checkpoint.loading import load
from mambax.checkpoint.saving import convert, save_pretrained

__all__ = ["convert", "load", "save_pretrained"]
