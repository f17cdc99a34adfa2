"""Every family as on an NVIDIA GPU, without one: tensors that have no memory, on a device that is taken for CUDA.

What reads a value, mixes devices, or computes by the kernels of another device fails here as it would there; the
Triton operators run as what they are for tracing. Dimensions: B batch, L length.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import family_cases
import numpy as np
import pytest
from harness import config_of

import mambax
from mambax import get_backend
from mambax.options import Mamba2Options
from mambax.sampling import SamplingParams, sample

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton is not installed")
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

nn = get_backend("torch")
DEVICE = "meta"
IDS = np.random.default_rng(0).integers(0, 97, (2, 9))
MASK = np.arange(9) >= np.array([[4], [0]])
TEXTS = np.arange(9)[None].repeat(2, 0) // 3
CASES = ("falcon_h1-norm-first-biases", "granite", "jamba", "mamba2attn", "nemotron_h-experts", "zamba2")


class OneDevice(TorchDispatchMode):
    """Refuses operations on tensors of two devices, but for single numbers; keeps what was run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        self.names.add(name)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.dim()]
        if len({x.device for x in given}) > 1 and name not in ("aten::copy_", "aten::_to_copy"):
            raise RuntimeError(f"{name}: tensors on two devices: {[str(x.device) for x in given]}")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[OneDevice]:
    """Within, tensors without memory are taken for those of CUDA."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: x.device.type == DEVICE))
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    for module in [module for name, module in sys.modules.items() if name.startswith("mambax_torch")]:
        for asked in ("why_not_triton", "why_not_triton_ssd"):
            if hasattr(module, asked):
                monkeypatch.setattr(module, asked, lambda x, *given: "" if x.dtype in narrow else "too wide")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)  # so that experts look at nothing
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *kind: False)
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda kind, *given, **options: autocast("cpu", *given, **options))
    with OneDevice() as mode:
        yield mode


def on_gpu(array: np.ndarray) -> Any:
    return torch.as_tensor(array).to(DEVICE)


def forwards(model: Any) -> None:
    """Prompts, padded and packed; from a state, a prompt and a token; ids of the host and of the device."""
    ids, mask, texts = map(on_gpu, (IDS, MASK, TEXTS))
    with torch.no_grad():
        model(IDS, mask=MASK)
        model(ids, mask=mask, logits_to_keep=1)
        model(IDS, segment_ids=TEXTS)
        model(ids, segment_ids=texts)
        state = model(ids).state
        model(ids, state)
        output = model(ids[:, :1], state)
        assert {x.device.type for x in (output.logits, *output.state.arrays().values())} == {DEVICE}
        model(ids[:, :1], model.init_state(2))


def gradients(model: Any) -> None:
    """With and without gradient checkpointing, packed and padded."""
    model.train()
    ids, mask, texts = map(on_gpu, (IDS, MASK, TEXTS))
    for again in (False, True):
        model.backbone.gradient_checkpointing = again
        for marks in ({}, {"mask": mask}, {"segment_ids": texts}):
            model.zero_grad()
            model(ids, labels=ids, **marks).loss.backward()
            for name, x in model.named_parameters():
                reached = not name.endswith("e_score_correction_bias")  # which only chooses
                assert not reached or (x.grad is not None and x.grad.device.type == DEVICE), name


def ran(mode: OneDevice) -> set[str]:
    """The kernels among what was run."""
    return {name.removeprefix("mambax::triton_") for name in mode.names if name.startswith("mambax::")}


@pytest.mark.parametrize("case", CASES)
def test_every_family(case, tmp_path, gpu):
    family_cases.write(case, tmp_path)
    model = mambax.load(tmp_path, backend="torch", device="cpu").to(DEVICE)
    gpu.names.clear()
    forwards(model)
    gradients(model)
    kernels = ran(gpu)
    assert {"causal_conv1d", "causal_conv1d_backward"} <= kernels
    assert kernels & {"ssd_backward", "selective_scan_backward"}
    assert not any("cpu_" in name for name in kernels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_mixers_and_other_heads(dtype, gpu):
    mamba2 = Mamba2Options(n_heads=4, head_dim=16, d_state=16)
    config = config_of(layer_types=("mamba", "mamba2", "mamba"), mamba2=mamba2)
    model = nn.MambaForCausalLM(config).to(DEVICE, dtype)
    forwards(model)
    gradients(model)
    assert {"ssd", "ssd_backward", "selective_scan", "selective_scan_backward", "rms_norm"} <= ran(gpu)


@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(1.3, 0.9, 30, 0.9, 0.01)], ids=["greedy", "every filter"]
)
def test_sampling(params, gpu):
    logits, uniform = torch.randn(2, 101, device=DEVICE), torch.rand(2, 1, device=DEVICE)
    seen = torch.zeros(2, 101, dtype=torch.bool, device=DEVICE)
    assert sample(nn, logits, uniform, params, seen).device.type == DEVICE


def test_a_tensor_left_behind_is_caught(gpu, monkeypatch):
    model = nn.MambaForCausalLM(config_of()).to(DEVICE)
    rms_norm = type(model.backbone.norm_f).forward
    monkeypatch.setattr(
        type(model.backbone.norm_f), "forward", lambda self, x: rms_norm(self, x) + torch.ones(x.shape[-1])
    )
    with pytest.raises(RuntimeError, match="device"), torch.no_grad():
        model(on_gpu(IDS))
