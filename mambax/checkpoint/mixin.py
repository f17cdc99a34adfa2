"""What every model can do with files."""

from __future__ import annotations

import os
from typing import Any, ClassVar

from mambax.backend import Backend
from mambax.checkpoint.mapping import Mappings
from mambax.lora import Lora
from mambax.paths import path_of
from mambax.state import InferenceParams


class CheckpointMixin:
    """``save_pretrained`` and ``load_state`` of a model."""

    nn: ClassVar[Backend]
    config: Any
    backbone: Any
    mappings = Mappings()
    """The files whose weights the model uses in place; set by :func:`mambax.load`."""
    adapter: Lora | None = None
    """What the low-rank adapters of the model have in common; None without any. See :mod:`mambax.adapters`."""

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        tokenizer: bool = True,
        max_shard_size: int = 5 * 10**9,
    ) -> None:
        """Write this model as a Hugging Face checkpoint; see :func:`mambax.save_pretrained`."""
        from mambax.checkpoint.saving import save_pretrained

        save_pretrained(self, folder, tokenizer=tokenizer, max_shard_size=max_shard_size)

    def load_state(self, path: str | os.PathLike[str]) -> InferenceParams:
        """Read a state that :meth:`mambax.InferenceParams.save` wrote, on any backend, to go on from it here.

        Its values are brought to this model's dtypes: a state of the float64 reference is rounded.

        Args:
            path: the file.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when it is not a state, or one of another model: all shapes but the batch must be this
                model's.
        """
        from mambax.checkpoint.state_files import read_state

        nn, like = self.nn, self.backbone.init_state(1)
        own = {name: nn.to_numpy(array) for name, array in like.arrays().items()}
        arrays, count = read_state(path_of(path, "path"), {name: array.shape for name, array in own.items()})
        arrays = {name: array.astype(own[name].dtype, copy=False) for name, array in arrays.items()}
        return type(like).from_arrays(arrays, count, like=like.tokens_seen)
