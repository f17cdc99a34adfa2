"""RMSNorm with the residual stream by Triton against float64; on the CPU in Triton's interpreter.

Dimensions: R rows, M channels.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
from harness import TORCH_COMPILES
from tolerances import FORWARD, GRADIENT, assert_close

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton is not installed")
norm = pytest.importorskip("mambax_torch.kernels.norm")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
DTYPES = [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("float16", "float16")]
DTYPES = pytest.mark.parametrize(("dtype", "stream"), [*DTYPES, ("float32", None), ("bfloat16", None)])


def leaves(shape: tuple[int, ...], dtype: str, stream: str | None) -> list[Any]:
    """x, weight and residual (or None)."""
    generator = torch.Generator().manual_seed(shape[-1])

    def normal(shape: tuple[int, ...], dtype: str) -> Any:
        return torch.randn(shape, generator=generator).to(DEVICE, getattr(torch, dtype)).requires_grad_()

    return [normal(shape, dtype), normal(shape[-1:], dtype), None if stream is None else normal(shape, stream)]


def want(x: Any, weight: Any, residual: Any) -> tuple[Any, Any]:
    total = x if residual is None else residual + x
    return total * torch.rsqrt(total.square().mean(-1, keepdim=True) + EPS) * weight, total


def weigh(y: Any, total: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    factors = [torch.randn(y.shape, generator=generator).to(DEVICE) for _ in range(2)]
    return (y * factors[0]).sum() + (total * factors[1]).sum()


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 7, 40), (2, 9, 4)])
def test_outputs_and_every_gradient(shape, dtype, stream, monkeypatch):
    monkeypatch.setattr(norm, "PROGRAMS", 8)  # so that a program has several rows, and the last one fewer
    given = leaves(shape, dtype, stream)
    wide = [None if leaf is None else leaf.detach().double().requires_grad_() for leaf in given]
    got = norm.rms_norm(given[0], given[1], EPS, given[2])
    assert got[0].dtype == given[1].dtype
    assert got[1].dtype == (given[0] if stream is None else given[2]).dtype
    expected = want(*wide)
    for output, exact in zip(got, expected, strict=True):
        assert_close(output.detach().double().cpu(), exact.detach().cpu(), dtype)
    weigh(*got).backward()
    weigh(*expected).backward()
    for leaf, exact in zip(given, wide, strict=True):
        if leaf is not None:
            assert leaf.grad.dtype == leaf.dtype
            limit = GRADIENT["float32"] if dtype == "float32" else FORWARD[dtype]
            # of a single channel the gradient is what is left of two terms that nearly cancel
            limit = 0.2 if shape[-1] == 1 else limit
            assert_close(leaf.grad.double().cpu(), exact.grad.cpu(), tolerance=limit)


def test_statistics_of_large_values_are_in_float32():
    x = torch.full((2, 40), 300.0, dtype=torch.float16, device=DEVICE)  # whose square is infinite in float16
    y, _ = norm.rms_norm(x, torch.ones(40, dtype=torch.float16, device=DEVICE), EPS)
    assert_close(y.double().cpu(), torch.ones(2, 40), "float16")


def test_parts_of_larger_arrays():
    whole = torch.randn(3, 4, 80, device=DEVICE)
    x, weight = whole[..., :40], torch.randn(40, device=DEVICE)
    assert_close(norm.rms_norm(x, weight, EPS)[0].cpu(), want(x.double(), weight.double(), None)[0].cpu())
    turned = torch.randn(40, 6, device=DEVICE).t()
    assert_close(norm.rms_norm(turned, weight, EPS)[0].cpu(), want(turned.double(), weight.double(), None)[0].cpu())


def test_the_same_bits_every_time():
    gradients = []
    for _ in range(2):
        given = leaves((2, 30, 8), "float32", "float32")
        weigh(*norm.rms_norm(given[0], given[1], EPS, given[2])).backward()
        gradients.append([leaf.grad for leaf in given])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_torch_finds_nothing_wrong_with_the_operator():
    x, weight, residual = leaves((2, 3, 8), "float32", "float32")
    operator = torch.ops.mambax.triton_rms_norm.default
    torch.library.opcheck(operator, (x, residual, weight, EPS, True))
    torch.library.opcheck(operator, (x, None, weight, EPS, True))


@TORCH_COMPILES
def test_compiled_and_checkpointed():
    from torch.utils.checkpoint import checkpoint

    def loss(x: Any, weight: Any, residual: Any) -> Any:
        return weigh(*norm.rms_norm(x, weight, EPS, residual))

    given = leaves((2, 3, 8), "bfloat16", "float32")
    loss(*given).backward()
    torch._dynamo.reset()
    factors = [torch.randn(2, 3, 8, device=DEVICE) for _ in range(2)]

    def simple(x: Any, weight: Any, residual: Any) -> Any:
        y, total = norm.rms_norm(x, weight, EPS, residual)
        return (y * factors[0]).sum() + (total * factors[1]).sum()

    results = []
    for function in (
        simple,
        torch.compile(simple, fullgraph=True, backend="aot_eager"),
        lambda *given: checkpoint(simple, *given, use_reentrant=False),
    ):
        again = leaves((2, 3, 8), "bfloat16", "float32")
        function(*again).backward()
        results.append([leaf.grad for leaf in again])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_what_does_not_fit_is_refused():
    x, weight, residual = leaves((2, 8), "float32", "float32")
    with pytest.raises(ValueError, match=r"a weight for each.*found \(7,\)"):
        norm.rms_norm(x, weight[:7], EPS)
    with pytest.raises(ValueError, match=r"residual is \(1, 8\); expected \(2, 8\)"):
        norm.rms_norm(x, weight, EPS, residual[:1])
    with pytest.raises(ValueError, match="at most 65536 channels"):
        norm.rms_norm(torch.zeros(1, 65537, device=DEVICE), torch.zeros(65537, device=DEVICE), EPS)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")
def test_offsets_beyond_two_to_the_31():
    if torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("needs 24 GB of free GPU memory")
    x = torch.randn((1_100_000, 2048), device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(2048, device="cuda", dtype=torch.bfloat16)
    y, _ = norm.rms_norm(x, weight, EPS)
    assert torch.equal(y[-100:], norm.rms_norm(x[-100:], weight, EPS)[0])


@pytest.fixture
def process_group(tmp_path: Any) -> Any:
    """A group of this process alone."""
    import torch.distributed as dist

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(sys.platform == "win32", reason="Triton runs on Linux")
@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore")  # of torch.distributed
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_distributed_wrappers(wrapper):
    from mambax_torch.kernels.conv import causal_conv1d

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(0)
            self.scale = torch.nn.Parameter(torch.randn(8, generator=generator))
            self.taps = torch.nn.Parameter(torch.randn(8, 1, 4, generator=generator))

        def forward(self, x: Any, residual: Any) -> Any:
            y, total = norm.rms_norm(x, self.scale, EPS, residual)
            return causal_conv1d(y, self.taps)[0] + total

    def gradients(layer: Any) -> list[Any]:
        x, _, residual = leaves((2, 5, 8), "float32", "float32")
        layer(x, residual).square().sum().backward()
        found = [parameter.grad for parameter in layer.parameters()]
        return [x.grad, *(g.full_tensor() if hasattr(g, "full_tensor") else g for g in found)]

    want = gradients(Layer().to(DEVICE))
    layer = Layer().to(DEVICE)
    if wrapper == "ddp":
        layer = torch.nn.parallel.DistributedDataParallel(layer)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(layer, mesh=init_device_mesh(DEVICE, (1,)))
    for got, expected in zip(gradients(layer), want, strict=True):
        assert_close(got.cpu(), expected.cpu())
