"""Whole models on the GPU beside others: decoding, prefill, a million tokens.

Weights are random; mamba_ssm and transformers get those of mambax, and their logits are compared with its.

Dimensions: B batch, L length, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from benchmarks import gpu_peers
from benchmarks.contender import Unavailable
from benchmarks.gpu_context import Context
from benchmarks.gpu_plans import MODELS
from benchmarks.gpu_rivals import Rival
from benchmarks.harness import Case

FLOAT32_ALWAYS = (".A_log", ".D", ".dt_proj.bias")


def mambax_model(c: Context, name: str, dtype: torch.dtype) -> Any:
    """A model of a shape, its weights made on the device."""
    from mambax import MambaLMConfig, get_backend
    from mambax.init import Initializer

    nn = get_backend("torch")
    config = MambaLMConfig(**MODELS[name])
    model = nn.MambaForCausalLM(config, init=Initializer(None))
    generator = torch.Generator(c.plan.device).manual_seed(0)
    values = {}
    for path, held in nn.parameters(model).items():
        wide = dtype if not path.endswith(FLOAT32_ALWAYS) else torch.float32
        values[path] = random_values(path, tuple(held.shape), generator, c.plan.device).to(wide)
    nn.set_parameters(model, values)
    return model.eval()


def random_values(path: str, shape: tuple[int, ...], generator: torch.Generator, device: str) -> torch.Tensor:
    """Random values of the sizes that a trained model has, float32."""
    if path.endswith("A_log"):
        return torch.arange(1, shape[1] + 1, device=device).float().log().expand(shape).contiguous()
    if path.endswith(("norm.weight", "norm_f.weight", ".D")):
        return torch.ones(shape, device=device)
    values = torch.randn(shape, generator=generator, device=device)
    if path.endswith("dt_proj.bias"):
        return values * 0.5 - 4.0
    return values * (0.02 if path.endswith("embeddings.weight") else math.prod(shape[1:]) ** -0.5)


def mamba_ssm_model(c: Context, name: str, dtype: torch.dtype, weights: dict[str, torch.Tensor]) -> Any:
    """mamba_ssm's model with these weights."""
    module = gpu_peers.load("mamba_ssm.models.mixer_seq_simple", folder=c.peers)
    config = gpu_peers.load("mamba_ssm.models.config_mamba", folder=c.peers).MambaConfig(**MODELS[name])
    if c.plan.device != "cuda":
        raise Unavailable("mamba_ssm's models run on a GPU alone")
    model = module.MambaLMHeadModel(config, device=c.plan.device, dtype=dtype)
    renamed = {path.replace("embeddings.", "embedding."): value.to(dtype) for path, value in weights.items()}
    renamed["lm_head.weight"] = renamed["backbone.embedding.weight"]
    model.load_state_dict(renamed)
    return model.eval()


def transformers_model(c: Context, name: str, dtype: torch.dtype, weights: dict[str, torch.Tensor]) -> Any:
    """transformers' model with these weights. Without mamba_ssm's kernels it loops over tokens."""
    module = gpu_peers.load("transformers", folder=None)
    shape = MODELS[name]
    config = module.MambaConfig(
        hidden_size=shape["d_model"], num_hidden_layers=shape["n_layer"], vocab_size=shape["vocab_size"]
    )
    with torch.device("meta"):
        model = module.MambaForCausalLM(config)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    return model.to(device=c.plan.device, dtype=dtype).eval()


def token_ids(c: Context, name: str, batch: int, length: int) -> torch.Tensor:
    ids = np.random.default_rng(length).integers(0, MODELS[name]["vocab_size"], (batch, length))
    return torch.from_numpy(ids).to(c.plan.device)


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {path: value.detach() for path, value in model.named_parameters()}


def _against(want: torch.Tensor) -> Callable[[Any], dict[str, float]]:
    """The error of the logits of the last position."""

    def check(logits: torch.Tensor) -> dict[str, float]:
        got = logits[:, -1, : want.shape[-1]].detach().float()
        return {"error": float((got - want).norm() / want.norm())}

    return check


# --- prefill -------------------------------------------------------------------------------------------------


def prefill(c: Context) -> Iterator[Case]:
    """Reading a prompt, up to the logits of the next token."""
    name, (batch, length) = c.plan.prefill
    model = mambax_model(c, name, c.dtype)
    ids, weights = token_ids(c, name, batch, length), weights_of(model)
    with torch.no_grad():
        want = model(ids, logits_to_keep=1).logits[:, -1].float()

    def official() -> Callable[[], Any]:
        other = mamba_ssm_model(c, name, c.dtype, weights)
        return lambda: other(ids, num_last_tokens=1).logits

    def hugging_face() -> Callable[[], Any]:
        other = transformers_model(c, name, c.dtype, weights)
        return lambda: other(ids, logits_to_keep=1, use_cache=False).logits

    job = {"kind": "prefill", "model": name, "batch": batch, "length": length, "precision": c.plan.dtype}
    rivals = [
        Rival("mambax", lambda: lambda: model(ids, logits_to_keep=1).logits, _against(want)),
        Rival("mamba_ssm", official, _against(want)),
        Rival("transformers", hugging_face, _against(want)),
    ]
    yield c.arena.compare("prefill", job, rivals, alone=True)


def million(c: Context) -> Iterator[Case]:
    """One very long prompt, at once and in chunks: the logits must be the same."""
    name, length = c.plan.long_model, c.plan.long
    model = mambax_model(c, name, c.dtype)
    ids = token_ids(c, name, 1, length)

    def chunked(size: int) -> Callable[[], Any]:
        def run() -> Any:
            state, logits = None, None
            for part in ids.split(size, 1):
                output = model(part, state, logits_to_keep=1)
                state, logits = output.state, output.logits
            return logits

        return run

    with torch.no_grad():
        want = chunked(max(1, length // 100))()[:, -1].float()
    rivals = [
        Rival("mambax at once", lambda: lambda: model(ids, logits_to_keep=1).logits, _against(want)),
        Rival("mambax in chunks", lambda: chunked(max(1, length // 16)), _against(want)),
    ]
    job = {"kind": "prefill", "model": name, "batch": 1, "length": length, "precision": c.plan.dtype}
    yield c.arena.compare("million tokens", job, rivals)


# --- decoding ------------------------------------------------------------------------------------------------


def decode(c: Context) -> Iterator[Case]:
    """A token of each row; the weights' bytes, which every step reads, are among the figures."""
    from benchmarks import gpu_quantized  # which imports this

    name, batches, steps = c.plan.decode
    model = mambax_model(c, name, c.dtype)
    weights = weights_of(model)
    for batch in batches:
        figures = read_by_a_step(model, batch)
        rivals = [
            Rival("mambax graph", graph_steps(c, model, batch, steps), lambda _, f=figures: f, steps),
            *(gpu_quantized.decoding(c, name, kind, batch, steps) for kind in ("int8", "int4")),
            Rival("mambax generate", _generate(c, model, batch, steps), lambda _, f=figures: f, steps),
            Rival("mamba_ssm graph", _official_steps(c, name, batch, steps, weights), parts=steps),
        ]
        job = {"kind": "decode", "model": name, "batch": batch, "precision": c.plan.dtype}
        yield c.arena.compare("decode", job, rivals, alone=True)


def read_by_a_step(model: Any, batch: int) -> dict[str, float]:
    """Bytes of the weights and of the state; all that a step moves, and its multiplications and additions."""
    tensors = [*model.parameters(), *model.buffers()]
    weights = float(sum(tensor.nbytes for tensor in tensors))
    state = float(sum(array.nbytes for array in model.init_state(batch).arrays().values()))
    halves = sum(tensor.numel() * (2 if tensor.dtype == torch.uint8 else 1) for tensor in tensors)
    return {
        "weights": weights, "state": state, "bytes": weights + 2 * state, "operations": 2.0 * batch * halves,
    }  # fmt: skip


def graph_steps(c: Context, model: Any, batch: int, steps: int) -> Callable[[], Callable[[], Any]]:
    """The captured step by itself, greedy; without a GPU the same steps are run as they are."""

    def make() -> Callable[[], Any]:
        from mambax_torch import graph

        from mambax.sampling import SamplingParams

        state = model.init_state(batch)
        capture = None if c.plan.device == "cuda" else False
        made = graph.stepper(model, SamplingParams(), state, capture=capture)
        if made is None:
            raise Unavailable(graph.why_not_graph(model, state.tokens_seen))
        made.begin(state, torch.zeros(batch, dtype=torch.int64, device=c.plan.device), None)
        uniform = np.zeros((batch, 1), np.float32)

        def run() -> None:
            for _ in range(steps):
                made.advance(uniform)

        return run

    return make


def _generate(c: Context, model: Any, batch: int, steps: int) -> Callable[[], Callable[[], Any]]:
    """The public interface: prompts of one token, everything included."""
    prompts = [[7]] * batch
    return lambda: lambda: model.generate(prompts, max_new_tokens=steps, eos=())


def _official_steps(
    c: Context, name: str, batch: int, steps: int, weights: dict[str, torch.Tensor]
) -> Callable[[], Callable[[], Any]]:
    """mamba_ssm's generation with its CUDA graph."""

    def make() -> Callable[[], Any]:
        model = mamba_ssm_model(c, name, c.dtype, weights)
        ids = token_ids(c, name, batch, 1)
        return lambda: model.generate(ids, max_length=1 + steps, cg=True, top_k=1)

    return make
