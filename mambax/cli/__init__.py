"""The command line: ``mambax generate | chat | info | doctor | convert``."""

from mambax.cli.app import app, main

__all__ = ["app", "main"]
