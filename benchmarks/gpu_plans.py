"""What the GPU benchmark measures: everything, or tiny sizes that only show that it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.gpu_rivals import Pace

MODELS: dict[str, dict[str, Any]] = {
    "mamba-130m": {"d_model": 768, "n_layer": 24, "vocab_size": 50280},
    "mamba-1.4b": {"d_model": 2048, "n_layer": 48, "vocab_size": 50280},
    "mamba-2.8b": {"d_model": 2560, "n_layer": 64, "vocab_size": 50280},
    "tiny": {"d_model": 32, "n_layer": 2, "vocab_size": 96},
}
"""Fields of :class:`mambax.MambaLMConfig`; others have their defaults."""


@dataclass(frozen=True)
class Plan:
    """Sizes.

    Args:
        name: ``"full"`` or ``"dry-run"``.
        device: ``"cuda"`` or ``"cpu"``.
        dtype: of activations, and of the weights of models that only infer.
        pace: how long to measure.
        bytes, side: of a copy, and of square matrices.
        lengths, batches, channels, states: the grid of the scan.
        tuned: sizes of the scan, (B, L, D, N), whose layouts are tried against each other.
        ssd, ssd_lengths: shapes of Mamba-2's scan, (H, P, G, N), and how long it is; with the same batches.
        long: tokens of the longest sequence.
        large: (L, D) of an array of more than 2^31 elements.
        rows: (B, L) of the convolution and of the norm, beside `widths` channels.
        decode: the model that decodes, its batches, and how many steps are timed together.
        prefill: the model that reads a prompt, and (B, L) of it.
        long_model: the model that reads `long` tokens.
        training: models, and (B, L) of their batch.
    """

    name: str
    device: str = "cuda"
    dtype: str = "bfloat16"
    pace: Pace = field(default_factory=Pace)
    bytes: int = 1 << 32
    side: int = 8192
    lengths: tuple[int, ...] = (512, 2048, 8192, 65536)
    batches: tuple[int, ...] = (1, 8)
    channels: tuple[int, ...] = (1536, 5120)
    states: tuple[int, ...] = (16, 64)
    tuned: tuple[tuple[int, int, int, int], ...] = (
        (1, 512, 1536, 16), (1, 2048, 1536, 16), (1, 8192, 1536, 16), (1, 65536, 1536, 16), (1, 8192, 5120, 16),
        (8, 2048, 1536, 16), (4, 2048, 4096, 16), (8, 2048, 5120, 16), (1, 8192, 1536, 64),
    )  # fmt: skip
    ssd: Mapping[str, tuple[int, int, int, int]] = field(
        default_factory=lambda: {"mamba2-130m": (24, 64, 1, 128), "mamba2-2.7b": (80, 64, 1, 128)}
    )
    ssd_lengths: tuple[int, ...] = (2048, 8192, 32768)
    long: int = 1_000_000
    large: tuple[int, int] = (1_100_000, 2048)
    rows: tuple[int, int] = (4, 2048)
    widths: tuple[int, ...] = (1536, 4096)
    decode: tuple[str, tuple[int, ...], int] = ("mamba-2.8b", (1, 64), 32)
    prefill: tuple[str, tuple[int, int]] = ("mamba-1.4b", (4, 2048))
    long_model: str = "mamba-130m"
    training: tuple[tuple[str, tuple[int, int]], ...] = (("mamba-130m", (8, 2048)), ("mamba-1.4b", (4, 2048)))


FULL = Plan("full")
DRY_RUN = Plan(
    "dry-run", device="cpu", dtype="float32", pace=Pace(rounds=1, turn_s=0.0, most=1), bytes=1 << 16, side=32,
    lengths=(9,), batches=(1,), channels=(8,), states=(4,), tuned=((1, 9, 8, 4),), ssd={"tiny": (1, 4, 1, 4)},
    ssd_lengths=(9,), long=10, large=(40, 8), rows=(1, 9), widths=(8,),
    decode=("tiny", (1, 2), 2), prefill=("tiny", (1, 9)), long_model="tiny", training=(("tiny", (1, 9)),),
)  # fmt: skip

PLANS = {plan.name: plan for plan in (FULL, DRY_RUN)}
