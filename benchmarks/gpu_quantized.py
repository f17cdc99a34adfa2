"""int8 and int4 weights on the GPU: decoding with them, and their products beside PyTorch's, of the same numbers.

A product takes microseconds and its weights fit into the second-level cache. So a run is a CUDA graph of products
with one copy of the weights after another, more than the cache holds.

Dimensions: M rows, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import gpu_models
from benchmarks.contender import Unavailable
from benchmarks.gpu_context import Context
from benchmarks.gpu_plans import MODELS
from benchmarks.gpu_rivals import Rival
from benchmarks.harness import Case

GROUP = 32
"""Inputs to a scale of int4."""


# --- decoding ------------------------------------------------------------------------------------------------


def decoding(c: Context, name: str, kind: str, batch: int, steps: int) -> Rival:
    """The captured step of a model with random int8 or int4 weights, whose text means nothing."""
    figures: dict[str, float] = {}

    def make() -> Callable[[], Any]:
        model = quantized_model(c, name, c.dtype, kind)
        figures.update(gpu_models.read_by_a_step(model, batch))
        run = gpu_models.graph_steps(c, model, batch, steps)()
        return lambda held=model: run()  # a graph does not hold its model

    return Rival(f"mambax graph {kind}", make, lambda _: figures, steps)


def quantized_model(c: Context, name: str, dtype: torch.dtype, kind: str) -> Any:
    """A model of a shape, its bits made on the device: choosing them for given weights would take minutes."""
    from mambax import MambaLMConfig, get_backend
    from mambax.init import Initializer

    nn = get_backend("torch")
    model = nn.quantize(nn.MambaForCausalLM(MambaLMConfig(**MODELS[name]), init=Initializer(None)), kind)
    model.backbone.embeddings.dtype = dtype
    generator = torch.Generator(c.plan.device).manual_seed(0)
    options: dict[str, Any] = {"device": c.plan.device}
    values = {}
    for path, held in nn.parameters(model).items():
        shape = tuple(held.shape)
        if held.dtype in (torch.int8, torch.uint8):
            low, high = (-127, 128) if held.dtype == torch.int8 else (0, 256)
            values[path] = torch.randint(low, high, shape, generator=generator, dtype=held.dtype, **options)
        elif path.endswith(".scales"):
            spread = 127 / 3**0.5 if held.dtype == torch.float32 else 4.6  # of the numbers
            inputs = model.get_submodule(path.rpartition(".")[0]).in_features
            size = 0.02 if "embeddings" in path else inputs**-0.5
            values[path] = torch.full(shape, size / spread, dtype=held.dtype, **options)
        else:
            wide = dtype if not path.endswith(gpu_models.FLOAT32_ALWAYS) else torch.float32
            values[path] = gpu_models.random_values(path, shape, generator, c.plan.device).to(wide)
    nn.set_parameters(model, values)
    return model.eval()


# --- products ------------------------------------------------------------------------------------------------


def products(c: Context) -> Iterator[Case]:
    """in_proj and out_proj of the model that decodes, for the rows that it decodes."""
    name, batches, _ = c.plan.decode
    width = MODELS[name]["d_model"]
    for layer, outputs, inputs in (("in_proj", 4 * width, width), ("out_proj", width, 2 * width)):
        for rows in batches:
            yield _case(c, layer, rows, outputs, inputs)


def _case(c: Context, layer: str, rows: int, outputs: int, inputs: int) -> Case:
    generator = torch.Generator(c.plan.device).manual_seed(0)
    x = torch.randn((rows, inputs), generator=generator, device=c.plan.device).to(c.dtype)
    full = torch.randn((outputs, inputs), generator=generator, device=c.plan.device).to(c.dtype) / inputs**0.5
    rivals = [
        _rival(c, "torch", lambda: (full,), lambda w: torch.nn.functional.linear(x, w), x, full),
        *_eight_bits(c, x, outputs),
        *_four_bits(c, x, outputs),
    ]
    job = {
        "kind": "quantised product", "batch": rows, "outputs": outputs, "inputs": inputs, "precision": c.plan.dtype,
    }  # fmt: skip
    return c.arena.compare(f"{layer}, {outputs} x {inputs}", job, rivals)


def _eight_bits(c: Context, x: Tensor, outputs: int) -> Iterator[Rival]:
    from mambax_torch import cuda_quantized

    inputs = x.shape[1]
    rng = np.random.default_rng(8)
    weight = torch.from_numpy(rng.integers(-127, 128, (outputs, inputs), np.int8)).to(c.plan.device)
    scales = torch.from_numpy(rng.uniform(0.5, 1.0, outputs).astype(np.float32)).to(c.plan.device)
    scales = scales.to(c.dtype).float()  # so that the formats of both have them
    wide = weight.float() * scales[:, None]

    def official() -> tuple[Tensor, ...]:
        _need(c, "_weight_int8pack_mm")
        return weight, scales.to(c.dtype)

    def ours(w: Tensor, s: Tensor) -> Tensor:
        return cuda_quantized.few_rows(x, w, s, None, inputs)

    yield _rival(c, "mambax int8", lambda: (weight, scales), ours, x, wide)
    yield _rival(c, "torch int8", official, lambda w, s: torch.ops.aten._weight_int8pack_mm(x, w, s), x, wide)


def _four_bits(c: Context, x: Tensor, outputs: int) -> Iterator[Rival]:
    from mambax_torch import cuda_quantized

    from mambax import quantization

    inputs = x.shape[1]
    padded = -(-inputs // quantization.BLOCK) * quantization.BLOCK
    rng = np.random.default_rng(4)
    numbers = np.zeros((outputs, padded), np.int8)
    numbers[:, :inputs] = rng.integers(-8, 8, (outputs, inputs), np.int8)
    weight = torch.from_numpy(quantization.packed(numbers)).to(c.plan.device)
    scales = torch.from_numpy(rng.uniform(0.5, 1.0, (outputs, padded // GROUP)).astype(np.float32))
    scales = scales.to(c.plan.device, torch.bfloat16)
    q = torch.from_numpy(numbers[:, :inputs]).to(c.plan.device)
    wide = q.float() * scales.float().repeat_interleave(GROUP, 1)[:, :inputs]

    def official() -> tuple[Tensor, ...]:
        """A value is a number from 0 to 15, minus 8, times its scale, plus its zero: (I / GROUP, O, 2)."""
        groups = scales[:, : -(-inputs // GROUP)].t().to(c.dtype)
        pairs = torch.stack([groups, torch.zeros_like(groups)], 2).contiguous()
        raised = q.int() + 8
        if c.plan.device == "cpu":
            _need(c, "_weight_int4pack_mm_for_cpu")
            return torch.ops.aten._convert_weight_to_int4pack_for_cpu(raised, 2), pairs
        _need(c, "_weight_int4pack_mm")
        two = ((raised[:, ::2] << 4) | raised[:, 1::2]).to(torch.uint8).contiguous()
        return torch.ops.aten._convert_weight_to_int4pack(two, 8), pairs

    def ours(w: Tensor, s: Tensor) -> Tensor:
        return cuda_quantized.few_rows(x, w, s, None, inputs)

    def theirs(w: Tensor, pairs: Tensor) -> Tensor:
        aten = torch.ops.aten
        run = aten._weight_int4pack_mm_for_cpu if c.plan.device == "cpu" else aten._weight_int4pack_mm
        return run(x, w, GROUP, pairs)

    yield _rival(c, "mambax int4", lambda: (weight, scales), ours, x, wide)
    yield _rival(c, "torch int4", official, theirs, x, wide)


def _need(c: Context, name: str) -> None:
    """Raise where PyTorch has no such operation on the device."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", c.plan.device.upper()):
        raise Unavailable(f"PyTorch {torch.__version__} has no {name} on {c.plan.device}")


def _rival(
    c: Context, label: str, weights: Callable[[], tuple[Tensor, ...]], product: Callable[..., Tensor], x: Tensor,
    wide: Tensor,
) -> Rival:  # fmt: skip
    """A product with weights in a format, which stand for `wide` (O, I)."""
    moved = float((x.numel() + len(x) * len(wide)) * x.element_size())
    size: list[float] = []
    copies = max(1, c.plan.bytes // 16 // wide.numel())

    def make() -> Callable[[], Any]:
        made = weights()
        size[:] = [float(sum(w.nbytes for w in made))]
        held = [made, *(tuple(w.clone() for w in made) for _ in range(copies - 1))]

        def run() -> Tensor:
            first, *_ = [product(*each) for each in held]
            return first

        return _replayed(c, run)

    def check(y: Tensor) -> dict[str, float]:
        want = x.float() @ wide.float().t()
        error = float((y.float() - want).norm() / want.norm())
        return {"error": error, "bytes": size[0] + moved, "operations": 2.0 * len(x) * wide.numel()}

    return Rival(label, make, check, parts=copies)


def _replayed(c: Context, run: Callable[[], Any]) -> Callable[[], Any]:
    """The run as a CUDA graph, whose launches take no time of the host; without a GPU, the run."""
    if c.plan.device != "cuda":
        return run
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # whatever compiles or allocates once does it here
        run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Any:
        graph.replay()
        return result

    return replay
