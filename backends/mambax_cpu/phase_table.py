"""The table that :mod:`mambax_cpu.phases` works through: one int64 row for each phase.

Addresses are of contiguous arrays, 0 for one that is absent. Values are float32, but for weights, and where
"narrow" is said: those are in the second precision of the kernel. This module loads no LLVM.

Dimensions: B rows (of the batch), M d_model, D d_inner, N d_state, K d_conv, R dt_rank; I inputs and O outputs of a
product. Of Mamba-2: H heads, P head_dim, G groups, C channels of the convolution = D + 2 G N.
"""

from __future__ import annotations

# --- every phase ---
OPERATION = 0
TASKS = 1  # how many
SIZE = 2  # outputs, or channels, of a task
BEFORE = 3  # what is done once before its tasks, bits
ROWS = 4  # B
SECOND = 5  # whether the product uses the kernel's second kind of weights
# --- a product ---
WEIGHT = 6  # (O, I)
SCALES = 7
SHIFT = 8
INPUTS = 9  # I
OUTPUTS = 10  # O
X = 11  # (B, I)
OUT = 12  # (B, O)
BIAS = 13  # (O,), narrow
WIDE_BIAS = 35  # (O,), float32, instead
SUM = 14  # (B, O), to which the product is added; or 0
PREPARED = 15  # scratch for x as weights of four bits take it
NBYTES = 16  # of WEIGHT
# --- the norm before a product ---
NORM = 17  # (I,), narrow
EPSILON = 18  # the bits of a float32
HIDDEN = 19  # (B, I), what the norm reads; X is what it writes, which may be the same
PARTS = 37  # of the inputs, each with a mean square of its own
# --- mixing: in_proj, some of whose outputs go through the convolution, and some are a gate, z ---
CONVOLVED = 38  # the first output of those that do: 0, or D of Mamba-2
CHANNELS = 20  # how many do: D, or C
PLAIN = 39  # the first output that is left as it is; all others are z
CONV_WIDTH = 21  # K
CONV = 22  # (D, K), narrow
CONV_BIAS = 23  # (D,), narrow
CONV_STATE = 24  # (B, K-1, D), narrow
NEW_CONV_STATE = 25  # (B, K-1, D), narrow
U = 26  # (B, D) or (B, C), after the convolution
# --- the recurrence: dt_proj, the scan step, the gate; X is what x_proj gives, (B, R + 2 N), and INPUTS is R ---
DT = 27  # (D, R), narrow
DT_BIAS = 28  # (D,)
A_LOG = 29  # (D, N)
SKIP = 30  # (D,)
STATES = 31  # N
STATE = 32  # (B, D, N)
NEW_STATE = 33  # (B, D, N)
GATE = 34  # (B, 2 D), of which the second half is silu(z)

FETCHED = 36  # cache lines of the next phase's weights that are fetched along with each channel
# --- the recurrence of Mamba-2: X is what in_proj gives, (B, O), with silu(z) first and dt last; CHANNELS is C;
# A_LOG, SKIP and DT_BIAS are (H,), STATE and NEW_STATE (B, H, P, N) ---
HEADS = 40  # H
HEAD_DIM = 41  # P
GROUPS = 42  # G
LIMITS = 43  # (2,), the least and the largest time step

FIELDS = 44

PRODUCT, MIX, RECUR = range(3)
"""Operations; RECUR of the kernels for Mamba-2 is its own."""
NORMALISE, PREPARE = 1, 2
"""Bits of BEFORE: the norm of HIDDEN to X; X as weights of four bits take it to PREPARED."""

LINE = 16
"""int64 values between two that different threads write: two cache lines."""


def control_size(slots: int) -> int:
    """int64 values of the memory that the threads share: the phase, what is done of it, and one of each slot."""
    return LINE * (2 + slots)


def scratch_size(rows: int, width: int) -> int:
    """float32 values that each thread needs for B rows and K = width."""
    return 16 * max(19 * rows, 2 * width)
