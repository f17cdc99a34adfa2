"""How much is measured: everything, a part in a few minutes, or tiny sizes that only show that it runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """Sizes and durations.

    Args:
        name: ``"full"``, ``"quick"`` or ``"dry-run"``.
        model: a shape of :data:`benchmarks.shapes.SHAPES`.
        long_model: the shape whose decoding is followed for `flat_steps` steps.
        mamba2: a shape of Mamba-2.
        dtypes: of the weights of Mamba-2 beside others.
        rounds, least, turn_s, contender_s, call_s: as of :class:`benchmarks.harness.Settings`.
        length, channels, states: L, D and N of the scan that the implementations are compared at.
        lengths, other_states, other_channels: sizes that the scan is followed over, one varied at a time.
        prompts: tokens of the prompts that are prefilled.
        batches: rows that are decoded at once.
        steps: tokens that a row gets in one run.
        training: rows and tokens of each row of the training step.
        memory_bytes, side, exponentials: sizes of the limits' measurements.
        compiled: whether transformers is compiled too, which takes minutes.
    """

    name: str
    model: str = "mamba-130m"
    long_model: str = "small"
    mamba2: str = "mamba2-130m"
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    rounds: int = 5
    least: int = 2
    turn_s: float = 0.4
    contender_s: float = 10.0
    call_s: float = 10.0
    length: int = 2048
    channels: int = 1536
    states: int = 16
    lengths: tuple[int, ...] = (128, 512, 2048, 8192, 32768, 131072)
    other_states: tuple[int, ...] = (4, 64)
    other_channels: tuple[int, ...] = (512, 4096)
    prompts: tuple[int, ...] = (512, 2048)
    batches: tuple[int, ...] = (1, 8)
    steps: int = 16
    flat_steps: int = 100_000
    training: tuple[int, int] = (2, 512)
    memory_bytes: int = 1 << 30
    side: int = 2048
    exponentials: int = 1 << 28
    compiled: bool = True


FULL = Plan("full")
QUICK = Plan(
    "quick", dtypes=("float32",),
    rounds=2, least=1, turn_s=0.2, contender_s=4.0, call_s=5.0, lengths=(128, 2048), other_states=(),
    other_channels=(), prompts=(512,), flat_steps=5000, training=(2, 128), compiled=False,
)  # fmt: skip
DRY_RUN = Plan(
    "dry-run", model="tiny", long_model="tiny", mamba2="mamba2-tiny",
    rounds=1, least=1, turn_s=0.001, length=40, channels=48, states=4,
    lengths=(8, 40), other_states=(3,), other_channels=(24,), prompts=(24,),
    batches=(1, 2), steps=2,
    flat_steps=200, training=(2, 8), memory_bytes=1 << 20, side=64, exponentials=1 << 15, compiled=False,
)  # fmt: skip

PLANS = {plan.name: plan for plan in (FULL, QUICK, DRY_RUN)}
