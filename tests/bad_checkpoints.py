"""What the tests of damaged, hostile and mistaken checkpoints share: a good one, and what a refusal looks like."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from checkpoint_writers import write_hf
from harness import config_of, rounded, weights_of

import mambax

CONFIG = config_of(n_layer=1, vocab_size=24, tie_embeddings=True)
NORM = "backbone.norm_f.weight"


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return rounded(weights_of(CONFIG), "float32")


@pytest.fixture
def folder(tmp_path: Path, weights: dict[str, np.ndarray]) -> Path:
    """A checkpoint that is good until a test spoils it."""
    return write_hf(tmp_path / "model", CONFIG, weights)


def refused(folder: Path, *fragments: str, error: type[Exception] = ValueError) -> str:
    """Loading raises, and the message holds these texts."""
    with pytest.raises(error) as caught:
        mambax.load(folder, backend="numpy")
    for fragment in fragments:
        assert fragment in str(caught.value), str(caught.value)
    return str(caught.value)
