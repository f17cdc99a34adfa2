"""Language models of other packages, each used as its authors do when they generate.

Dimensions: B batch, L length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contender import Unavailable, optional
from benchmarks.shapes import folder_of, read_shape


class Transformers:
    """transformers on torch, without the kernels that need CUDA.

    Args:
        folder: what :mod:`benchmarks.weights` wrote.
        dtype: of the weights.
        mambapy: whether its prefill uses mambapy's parallel scan.
        compiled: whether it goes through torch.compile.
    """

    def __init__(self, folder: Path, dtype: str, mambapy: bool = False, compiled: bool = False) -> None:
        self.torch = optional("torch", "torch")
        transformers = optional("transformers", "transformers")
        options = {}
        if mambapy:
            optional("mambapy", "mambapy")
            options["use_mambapy"] = True  # which only Mamba-1 has
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder_of(folder, dtype), dtype=getattr(self.torch, dtype), **options
        ).eval()
        self.forward = self.torch.compile(self.model) if compiled else self.model

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        """Head of the last position only."""
        with self.torch.inference_mode():
            given = self.torch.from_numpy(ids[None])
            return self.forward(given, use_cache=True, logits_to_keep=1).logits[0, -1].float().numpy()

    def decoder(self, prompts: np.ndarray) -> Callable[[int], None]:
        """The model and argmax alone, which is faster than its generate."""
        with self.torch.inference_mode():
            output = self.model(self.torch.from_numpy(prompts), use_cache=True, logits_to_keep=1)
        held = [output]

        def step(count: int) -> None:
            with self.torch.inference_mode():
                for _ in range(count):
                    ids = held[0].logits[:, -1].argmax(-1, keepdim=True)
                    held[0] = self.forward(ids, cache_params=held[0].cache_params, use_cache=True)
                held[0].logits[0, 0, 0].item()

        return step

    def parameter_bytes(self) -> int:
        """Every parameter once."""
        return sum(p.nbytes for p in self.model.parameters())


class Mambapy:
    """mambapy on torch, float32: parallel scan for a prompt, its step for a token.

    Args:
        folder: what :mod:`benchmarks.weights` wrote.
        dtype: of the weights.
    """

    def __init__(self, folder: Path, dtype: str) -> None:
        self.torch = optional("torch", "torch")
        if dtype != "float32":
            raise Unavailable("mambapy mixes dtypes in its scan; it runs in float32")
        self.model = mambapy_model(read_shape(folder))
        load_file = optional("safetensors.torch", "safetensors").load_file
        names = {"backbone.embeddings": "embedding", "backbone.layers": "mamba.layers", "backbone.norm_f": "norm_f"}
        values = {}
        for name, value in load_file(folder_of(folder, dtype) / "model.safetensors").items():
            old = next(old for old in names if name.startswith(old))
            values[name.replace(old, names[old])] = value
        values["lm_head.weight"] = values["embedding.weight"]
        self.model.load_state_dict(values)
        self.model.eval()

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        """Its layers one after another, head of the last position only."""
        with self.torch.inference_mode():
            hidden = self.model.mamba(self.model.embedding(self.torch.from_numpy(ids[None])))
            return self.model.lm_head(self.model.norm_f(hidden[:, -1]))[0].numpy()

    def decoder(self, prompts: np.ndarray) -> Callable[[int], None]:
        """Its step and argmax. The prompt goes token by token, as in its generate."""
        torch, config = self.torch, self.model.config
        batch = len(prompts)
        empty = torch.zeros(batch, config.d_inner, config.d_conv - 1)
        caches: list[Any] = [(None, empty) for _ in range(config.n_layers)]
        held: list[Any] = [None, caches]
        with torch.inference_mode():
            for column in prompts.T:
                held[0], held[1] = self.model.step(torch.from_numpy(column.copy()), held[1])

        def step(count: int) -> None:
            with torch.inference_mode():
                for _ in range(count):
                    held[0], held[1] = self.model.step(held[0].argmax(-1), held[1])
                held[0][0, 0].item()

        return step

    def parameter_bytes(self) -> int:
        """Every parameter once."""
        return sum(p.nbytes for p in self.model.parameters())


def mambapy_model(shape: dict[str, Any]) -> Any:
    """mambapy's layers of a shape between a table of embeddings and a norm and head as of its own language model.

    That one cannot be imported without mamba_ssm, which needs CUDA. The head is the table.
    """
    from torch import nn

    mamba = optional("mambapy.mamba", "mambapy")
    config = mamba.MambaConfig(
        d_model=shape["d_model"], n_layers=shape["n_layer"], dt_rank=shape["dt_rank"], d_state=shape["d_state"],
        expand_factor=int(shape["expand"]), d_conv=shape["d_conv"], rms_norm_eps=shape["norm_epsilon"],
    )  # fmt: skip

    class LanguageModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = config
            self.embedding = nn.Embedding(shape["vocab_size"], config.d_model)
            self.mamba = mamba.Mamba(config)
            self.norm_f = mamba.RMSNorm(config.d_model, config.rms_norm_eps)
            self.lm_head = nn.Linear(config.d_model, shape["vocab_size"], bias=False)
            self.lm_head.weight = self.embedding.weight

        def forward(self, ids: Any) -> Any:
            return self.lm_head(self.norm_f(self.mamba(self.embedding(ids))))

        def step(self, ids: Any, caches: list[Any]) -> tuple[Any, list[Any]]:
            hidden, caches = self.mamba.step(self.embedding(ids), caches)
            return self.lm_head(self.norm_f(hidden)), caches

    return LanguageModel()


class MlxLm:
    """mlx-lm on MLX's CPU device.

    Args:
        folder: what :mod:`benchmarks.weights` wrote.
        dtype: of the weights.
        bits: quantise the linear layers to so many bits, in groups of 64; None for not at all.
    """

    def __init__(self, folder: Path, dtype: str, bits: int | None = None) -> None:
        self.mx = optional("mlx.core", "mlx")
        self.mx.set_default_device(self.mx.cpu)
        self.model, _ = optional("mlx_lm.utils", "mlx-lm").load_model(folder_of(folder, dtype))
        if bits is not None:
            nn = optional("mlx.nn", "mlx")
            group = 64 if self.model.args.hidden_size % 64 == 0 else 32

            def fits(path: str, layer: Any) -> bool:
                return hasattr(layer, "to_quantized") and layer.weight.shape[-1] % group == 0

            nn.quantize(self.model, group_size=group, bits=bits, class_predicate=fits)
            self.mx.eval(self.model.parameters())

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        """All but the last token, then that: so its generate does, and saves the head of the others."""
        cache = self.model.make_cache()
        given = self.mx.array(ids[None])
        self.model(given[:, :-1], cache)
        self.mx.eval([c.state for c in cache])
        return np.array(self.model(given[:, -1:], cache)[0, -1].astype(self.mx.float32))

    def decoder(self, prompts: np.ndarray) -> Callable[[int], None]:
        """The next step is launched before the last token is read, as in its generate."""
        mx = self.mx
        cache = self.model.make_cache()
        held = [mx.argmax(self.model(mx.array(prompts), cache)[:, -1], axis=-1)]
        mx.eval(held)

        def step(count: int) -> None:
            for _ in range(count):
                token = held[0]
                held[0] = mx.argmax(self.model(token[:, None], cache)[:, -1], axis=-1)
                mx.async_eval(held[0])
                mx.eval(token)
            mx.eval(held)

        return step

    def parameter_bytes(self) -> int:
        """Every parameter once."""
        flatten = optional("mlx.utils", "mlx").tree_flatten
        return sum(value.nbytes for _, value in flatten(self.model.parameters()))
