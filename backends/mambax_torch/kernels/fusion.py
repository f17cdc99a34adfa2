"""Whether a product and a sum become one operation, said at every launch: what Triton does unasked changes with its
versions."""

from __future__ import annotations

from typing import Any

FUSED: dict[str, Any] = {"enable_fp_fusion": True}

UNFUSED: dict[str, Any] = {"enable_fp_fusion": False}
"""For kernels in which threads add each other's products. Of two such threads each would round the other's product
alone, so that what should be one sum differed in its last bit, and it would depend on the threads' order which of
them is kept."""
