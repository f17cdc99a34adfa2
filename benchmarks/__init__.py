"""Benchmarks of mambax beside other implementations. Run ``python -m benchmarks.cpu``."""
