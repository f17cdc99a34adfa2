"""What every model can do with files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

from mambax.backend import Backend
from mambax.state import InferenceParams


class CheckpointMixin:
    """``save_pretrained`` and ``load_state`` of a model."""

    nn: ClassVar[Backend]
    config: Any
    backbone: Any

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
            ValueError: when it is not a state, or one of another model: number of layers, d_conv, d_inner and
                d_state must be this model's.
        """
        from mambax.checkpoint.state_files import StateShape, read_state

        nn, config = self.nn, self.config
        expected = StateShape(config.n_layer, config.d_conv - 1, config.d_inner, config.d_state)
        arrays = read_state(Path(path).expanduser(), expected)
        model_like = self.backbone.init_state(1)
        conv, ssm = (nn.to_numpy(array).dtype for array in model_like.layers[0])
        for name, array in arrays.items():
            if name != "tokens_seen":
                arrays[name] = array.astype(conv if name.endswith("conv_state") else ssm, copy=False)
        return type(model_like).from_arrays(arrays, like=model_like.tokens_seen)
