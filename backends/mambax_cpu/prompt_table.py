"""The table that :mod:`mambax_cpu.prompt_kernels` works through: one int64 row for each phase.

What :mod:`mambax_cpu.phase_work` reads lies where :mod:`mambax_cpu.phase_table` has it; the other fields are this
table's own. Addresses are of contiguous arrays, 0 for one that is absent; values are float32 where nothing else is
said, and "narrow" means the precision of the kernel.

Dimensions: B batch, L length, M d_model, D d_inner, N d_state, R dt_rank; I inputs and O outputs of a product.
"""

from __future__ import annotations

from mambax_cpu import phase_table

FIELDS = phase_table.FIELDS

# --- every phase ---
OPERATION = phase_table.OPERATION
TASKS = phase_table.TASKS
SIZE = phase_table.SIZE  # of a task: rows of a norm, strips of a product, groups of steps of a convolution
BEFORE = phase_table.BEFORE  # 0
NBYTES = phase_table.NBYTES  # 0
WEIGHT = (
    phase_table.WEIGHT
)  # narrow: (M,) of a norm, (O, I) of a product, (D, R) of dt_proj; of a convolution see CONV
ROWS = phase_table.ROWS  # B L
X = phase_table.X  # the inputs: (B L, M), (B L, I) narrow, (B, L, D) narrow; of a recurrence dt (B, L, R) narrow
X_ROW = 9  # elements, of dt and of a product's words of four bytes, from a row of X to the next
OUT = phase_table.OUT  # (B L, M) narrow, (B L, O), (B, L, D) narrow
# --- a norm ---
EPSILON = phase_table.EPSILON  # (1,)
INPUTS = 10  # M; of a product I, of a recurrence R, in words
# --- a product ---
OUTPUTS = 7  # O
OUT_ROW = 8  # elements from a row of OUT to the next
FORM = 14  # what becomes of the sums, of :mod:`mambax_cpu.tiles`
BIAS = phase_table.BIAS  # (O,) narrow; of a recurrence (D,)
SPLITS = 15  # into how many ranges the rows are cut
# --- a convolution ---
LENGTH = 17  # L
CHANNELS = phase_table.CHANNELS  # D
CONV = phase_table.CONV  # (5, D): the weights of four steps, then the bias
STATE = phase_table.STATE  # (B, 3, D) narrow; of a recurrence (B, D, N)
NEW_STATE = phase_table.NEW_STATE  # the same, which is written
# --- a recurrence ---
U = phase_table.U  # (B, L, D) narrow
Z = 34  # (B, L, D) narrow
Z_ROW = 35  # elements from a row of Z to the next
A_LOG = phase_table.A_LOG  # (D, N)
SKIP = phase_table.SKIP  # (D,)
STATES = phase_table.STATES  # N
B = 36  # (B L, N)
C = 37  # (B L, N)
BC_ROW = 38  # elements from a row of B, and of C, to the next

NORM, PRODUCT, CONVOLVE, RECUR = range(4)
"""Operations."""
