"""The Triton convolution against float64, forwards and backwards; on the CPU in Triton's interpreter.

Dimensions: B batch, L length, D channels, K width of the convolution.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
from harness import TORCH_COMPILES
from tolerances import FORWARD, GRADIENT, assert_close

from mambax import convolution

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton is not installed")
ops = pytest.importorskip("mambax_torch.ops")
conv = pytest.importorskip("mambax_torch.kernels.conv")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("xz", "weight", "bias", "initial_state")
SIZES = [(1, 1, 5), (1, 4, 5), (2, 2, 130), (3, 4, 20), (33, 3, 20), (40, 7, 5), (70, 4, 20), (40, 1, 20)]
"""(L, K, D): one step, less than the convolution, not a multiple of a tile in either direction, several tiles."""

LAYOUTS = pytest.mark.parametrize("layout", ["plain", "mask", "boundaries"])


def leaves(length: int, width: int, channels: int, *, batch: int = 2, dtype: Any = None) -> dict[str, Any]:
    """The arguments; x is the first half of xz (B, L, 2D), as in a model."""
    generator = torch.Generator().manual_seed(100 * length + width)

    def normal(*shape: int) -> Any:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype or torch.float32)

    shapes = {
        "xz": (batch, length, 2 * channels), "weight": (channels, 1, width), "bias": (channels,),
        "initial_state": (batch, width - 1, channels),
    }  # fmt: skip
    return {name: normal(*shape).requires_grad_() for name, shape in shapes.items()}


def positions(layout: str, length: int, batch: int = 2) -> dict[str, Any]:
    """A mask or boundaries: a row hardly used, and one with two masked or beginning positions side by side."""
    rng = np.random.default_rng(length)
    marked = rng.random((batch, length)) < 0.4
    marked[0, : length // 2] = layout == "mask"
    marked[1, length // 3 : length // 3 + 2] = True
    if layout == "plain":
        return {}
    return {layout: torch.tensor(~marked if layout == "mask" else marked, device=DEVICE)}


def call(function: Any, given: dict[str, Any], **options: Any) -> tuple[Any, Any]:
    channels = given["weight"].shape[0]
    rest = {name: given[name] for name in NAMES[1:] if given.get(name) is not None}
    return function(x=given["xz"][..., :channels], **rest, **options)


def seam(**arguments: Any) -> tuple[Any, Any]:
    return convolution.causal_conv1d(ops, **arguments)


def double(given: dict[str, Any]) -> dict[str, Any]:
    return {name: leaf.detach().double().requires_grad_() for name, leaf in given.items()}


def weigh(outputs: tuple[Any, Any], mask: Any) -> Any:
    """A sum of everything, each output by its own factor; masked outputs by none."""
    generator = torch.Generator().manual_seed(1)
    total = 0.0
    for output in outputs:
        factors = torch.randn(output.shape, generator=generator).to(output)
        if mask is not None and output is outputs[0]:
            factors = factors * mask[..., None]
        total = total + (output * factors).sum()
    return total


@pytest.mark.parametrize(("length", "width", "channels"), SIZES)
@LAYOUTS
def test_outputs_state_and_every_gradient(length, width, channels, layout):
    options = positions(layout, length)
    given = leaves(length, width, channels)
    wide = double(given)
    got, want = call(conv.causal_conv1d, given, **options), call(seam, wide, **options)
    mask = options.get("mask")
    real = torch.ones(got[0].shape[:2], dtype=torch.bool, device=DEVICE) if mask is None else mask
    assert_close(got[0][real].detach().cpu(), want[0][real].detach().cpu(), what="y")
    np.testing.assert_array_equal(got[1].detach().double().cpu(), want[1].detach().cpu())
    weigh(got, mask).backward()
    weigh(want, mask).backward()
    for name in NAMES:
        if given[name].numel():
            assert_close(given[name].grad.cpu(), wide[name].grad.cpu(), what=name, tolerance=GRADIENT["float32"])


def test_against_the_list_of_inputs():
    given = {name: leaf.detach() for name, leaf in leaves(40, 4, 20).items()}
    y, final = call(conv.causal_conv1d, given, **positions("mask", 40))
    rest = {name: given[name].cpu().numpy() for name in NAMES[1:]}
    mask = positions("mask", 40)["mask"].cpu().numpy()
    want, last = reference.convolution(given["xz"][..., :20].cpu().numpy(), **rest, mask=mask)
    assert_close(y.cpu().numpy()[mask], want[mask])
    np.testing.assert_array_equal(final.double().cpu(), last)


@pytest.mark.parametrize("without", ["bias", "initial_state", "activation"])
def test_what_may_be_left_out(without):
    given = leaves(37, 4, 20)
    options = {"activation": None} if without == "activation" else {}
    given.pop(without, None)
    wide = double(given)
    got, want = call(conv.causal_conv1d, given, **options), call(seam, wide, **options)
    assert_close(got[0].detach().cpu(), want[0].detach().cpu())
    weigh(got, None).backward()
    weigh(want, None).backward()
    for name, leaf in given.items():
        assert_close(leaf.grad.cpu(), wide[name].grad.cpu(), what=name, tolerance=GRADIENT["float32"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_inputs_are_summed_in_float32(dtype):
    given = leaves(40, 4, 20, dtype=getattr(torch, dtype))
    wide = double(given)
    got, want = call(conv.causal_conv1d, given), call(seam, wide)
    assert got[0].dtype == got[1].dtype == getattr(torch, dtype)
    assert_close(got[0].detach().double().cpu(), want[0].detach().cpu(), dtype)
    weigh(got, None).backward()
    weigh(want, None).backward()
    for name, leaf in given.items():
        assert leaf.grad.dtype == leaf.dtype
        assert_close(leaf.grad.double().cpu(), wide[name].grad.cpu(), dtype, what=name)


@LAYOUTS
def test_nothing_is_read_that_does_not_count(layout, monkeypatch):
    """Outputs and scratch memory start as NaN; so do inputs at masked positions, and those of other sequences."""

    def poisoned(empty: Any) -> Any:
        def made(*args: Any, **options: Any) -> Any:
            room = empty(*args, **options)
            return room.fill_(float("nan")) if room.is_floating_point() else room

        return made

    given, options = leaves(40, 4, 20), positions(layout, 40)
    want = call(conv.causal_conv1d, given, **options)
    mask, grad = options.get("mask"), {}
    weigh(want, mask).backward()
    grad = {name: leaf.grad.clone() for name, leaf in given.items()}
    if layout == "mask":
        with torch.no_grad():
            given["xz"][~mask] = float("nan")
    for leaf in given.values():
        leaf.grad = None
    for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty_like"), (torch, "empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    got = call(conv.causal_conv1d, given, **options)
    assert torch.isfinite(got[0]).all()
    weigh(got, mask).backward()
    monkeypatch.undo()
    assert torch.equal(got[1], want[1])
    for name, leaf in given.items():
        assert torch.equal(leaf.grad, grad[name]), name


def test_a_sequence_does_not_see_the_one_before_it():
    given = {name: leaf.detach() for name, leaf in leaves(40, 4, 20).items()}
    boundaries = torch.zeros(2, 40, dtype=torch.bool, device=DEVICE)
    boundaries[:, 17] = True
    want, _ = call(conv.causal_conv1d, given, boundaries=boundaries)
    given["xz"][:, :17] = float("nan")
    got, _ = call(conv.causal_conv1d, given, boundaries=boundaries)
    assert torch.equal(got[:, 17:], want[:, 17:])


def test_the_same_bits_every_time():
    results = []
    for _ in range(2):
        given = leaves(70, 4, 20)
        weigh(call(conv.causal_conv1d, given), None).backward()
        results.append([leaf.grad for leaf in given.values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_torch_finds_nothing_wrong_with_the_operator():
    given = leaves(9, 4, 5, batch=1)
    x = given["xz"].detach()[..., :5].requires_grad_()
    weight, bias, state = (given[name] for name in NAMES[1:])
    operator = torch.ops.mambax.triton_causal_conv1d.default
    torch.library.opcheck(operator, (x, weight, bias, state, None, None, "silu"))
    torch.library.opcheck(
        operator, (x, weight, None, None, torch.ones(1, 9, dtype=torch.bool, device=DEVICE), None, None)
    )


@TORCH_COMPILES
def test_compiled_exported_and_checkpointed():
    from torch.utils.checkpoint import checkpoint

    def loss(xz: Any, weight: Any, bias: Any, initial_state: Any) -> Any:
        y, final = conv.causal_conv1d(xz[..., :5], weight, bias, initial_state=initial_state)
        return y.square().sum() + final.square().sum()

    given = leaves(9, 4, 5)
    loss(*given.values()).backward()
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for function in (compiled, lambda *given: checkpoint(loss, *given, use_reentrant=False)):
        again = leaves(9, 4, 5)
        function(*again.values()).backward()
        for name, leaf in again.items():
            assert_close(leaf.grad.cpu(), given[name].grad.cpu(), what=name)

    class Layer(torch.nn.Module):
        def forward(self, *given: Any) -> Any:
            return loss(*given)

    exported = torch.export.export(Layer(), tuple(leaf.detach() for leaf in given.values()))
    assert_close(exported.module()(*given.values()).detach().cpu(), loss(*given.values()).detach().cpu())


def test_weights_may_be_wider_than_inputs():
    given = leaves(9, 4, 5)
    given["xz"] = given["xz"].detach().bfloat16().requires_grad_()  # as under autocast
    y, final = call(conv.causal_conv1d, given)
    assert y.dtype == final.dtype == torch.bfloat16
    y.float().sum().backward()
    assert [given[name].grad.dtype for name in NAMES[:2]] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": (5, 4)}, r"weight \(D, 1, K\), found .*\(5, 4\)"),
        ({"bias": (4,)}, r"bias is \(4,\); expected \(5,\)"),
        ({"initial_state": (2, 2, 5)}, r"initial_state is \(2, 2, 5\); expected \(2, 3, 5\)"),
        ({"mask": (2, 8)}, r"mask is \(2, 8\); expected \(2, 9\)"),
        ({"activation": "relu"}, "'relu'.*'silu' or None"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    given = leaves(9, 4, 5)
    options = {name: torch.zeros(v, device=DEVICE) if isinstance(v, tuple) else v for name, v in changes.items()}
    given = {name: leaf for name, leaf in given.items() if name not in options}
    if "weight" in options:
        with pytest.raises(ValueError, match=message):
            conv.causal_conv1d(given["xz"], **options)
        return
    with pytest.raises(ValueError, match=message):
        call(conv.causal_conv1d, given, **options)


def test_mask_and_boundaries_together_are_refused():
    given = leaves(9, 4, 5)
    marks = torch.ones(2, 9, dtype=torch.bool, device=DEVICE)
    with pytest.raises(ValueError, match="a mask and boundaries"):
        call(conv.causal_conv1d, given, mask=marks, boundaries=marks)


def test_a_flipped_kernel_is_caught():
    given = leaves(20, 4, 5)
    wide = double(given)
    y, _ = call(conv.causal_conv1d, given | {"weight": given["weight"].flip(2)})
    want, _ = call(seam, wide)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(y.detach().cpu(), want.detach().cpu(), tolerance=FORWARD["bfloat16"])


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")
def test_offsets_beyond_two_to_the_31():
    """(1, 1.1 million, 2048) in bfloat16: 2.3e9 elements; the end must be what it is by itself."""
    if torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("needs 24 GB of free GPU memory")
    length, channels = 1_100_000, 2048
    x = torch.randn((1, length, channels), device="cuda", dtype=torch.bfloat16)
    weight, bias = torch.randn((channels, 1, 4), device="cuda"), torch.randn(channels, device="cuda")
    y, final = conv.causal_conv1d(x, weight, bias)
    tail = slice(length - 100, length)
    want, _ = conv.causal_conv1d(x[:, tail], weight, bias, initial_state=x[:, length - 103 : length - 100])
    assert torch.equal(y[:, tail], want)
    assert torch.equal(final, x[:, -3:])
