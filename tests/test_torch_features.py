"""A torch model is a torch module: everything that PyTorch does with one works."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import reference
from harness import TORCH_COMPILES, build, config_of, run, scan_params, state_arrays, token_ids, weights_of
from tolerances import FORWARD, GRADIENT, assert_close, relative_error

import mambax

torch = pytest.importorskip("torch")
nn = mambax.get_backend("torch")

CONFIG = config_of(n_layer=2)
WEIGHTS = weights_of(CONFIG)


@pytest.fixture
def model() -> Any:
    return build(nn, CONFIG, WEIGHTS)


def same(a: Any, b: Any) -> None:
    ids = token_ids(2, 9)
    np.testing.assert_array_equal(run(a, ids)[0], run(b, ids)[0])


def test_state_dict_has_the_names_of_checkpoints_and_round_trips(model):
    held = model.state_dict()
    assert set(held) == set(WEIGHTS)
    other = mambax.from_config(CONFIG, backend="torch", seed=9)
    assert relative_error(run(other, [[1, 2]])[0], run(model, [[1, 2]])[0]) > 0.1
    other.load_state_dict(held)
    same(other, model)
    buffer = io.BytesIO()
    torch.save(held, buffer)
    third = mambax.from_config(CONFIG, backend="torch", seed=8)
    third.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    same(third, model)
    with pytest.raises(RuntimeError, match="size mismatch"):
        mambax.from_config(config_of(n_layer=2, d_state=9), backend="torch").load_state_dict(held)


def test_a_tied_head_is_one_parameter():
    model = mambax.from_config(config_of(tie_embeddings=True), backend="torch")
    assert not any("lm_head" in name for name in model.state_dict())
    assert len(list(model.parameters())) == len(model.state_dict())


def test_pickle_and_deepcopy(model):
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        same(other, model)
        with torch.no_grad():
            other.backbone.norm_f.weight.mul_(2)
        assert relative_error(run(other, [[1, 2]])[0], run(model, [[1, 2]])[0]) > 0.1


def test_a_state_pickles(model):
    _, state = run(model, token_ids(2, 5))
    again = pickle.loads(pickle.dumps(state))
    for name, array in state_arrays(state).items():
        np.testing.assert_array_equal(state_arrays(again)[name], array)


def test_module_conveniences(model):
    assert "MambaMixer" in repr(model)
    assert sum(p.numel() for p in model.parameters()) == sum(w.size for w in WEIGHTS.values())
    seen = []
    handle = model.backbone.layers[1].mixer.register_forward_hook(lambda *call: seen.append(call[2][0].shape))
    run(model, token_ids(2, 5))
    handle.remove()
    assert seen == [(2, 5, 40)]
    model.requires_grad_(False)
    assert not model([[1]]).logits.requires_grad
    assert model.to(torch.bfloat16)([[1]]).logits.dtype == torch.float32


def test_double_and_half_precision(model):
    wide = copy.deepcopy(model).double()
    assert_close(run(wide, token_ids(2, 20))[0], reference.logits(WEIGHTS, token_ids(2, 20)), tolerance=1e-11)


def loss_of(logits: Any, ids: Any) -> Any:
    """Cross-entropy of the next token."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def test_the_loss_falls_under_an_optimiser():
    model = mambax.from_config(config_of(n_layer=1), backend="torch")
    ids = torch.as_tensor(token_ids(4, 24))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        optimiser.zero_grad()
        loss = loss_of(model(ids).logits, ids)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@TORCH_COMPILES
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's tracer looks at it on a state
def test_compile_without_graph_breaks(model):
    """The default compiler, whole graph, forward and backward, without and with a state."""
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    ids = torch.as_tensor(token_ids(2, 6))
    want = model(ids)
    got = compiled(ids)
    assert_close(nn.to_numpy(got.logits), nn.to_numpy(want.logits))
    more = torch.as_tensor(token_ids(2, 1))
    assert_close(nn.to_numpy(compiled(more, got.state).logits), nn.to_numpy(model(more, want.state).logits))

    def gradients(function: Any) -> dict[str, np.ndarray]:
        model.zero_grad()
        loss_of(function(ids).logits, ids).backward()
        return {name: p.grad.numpy().copy() for name, p in model.named_parameters()}

    want_gradients, got_gradients = gradients(model), gradients(compiled)
    for name in want_gradients:
        assert_close(got_gradients[name], want_gradients[name], what=name, tolerance=GRADIENT["float32"])


@pytest.mark.parametrize(("backend", "impl"), scan_params(("torch",)))
def test_every_implementation_traces_without_graph_breaks(backend, impl):
    torch._dynamo.reset()
    model = build(nn, config_of(n_layer=1, scan=impl))
    ids, mask = torch.as_tensor(token_ids(2, 6)), torch.tensor([[False] * 2 + [True] * 4, [True] * 6])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(nn.to_numpy(compiled(ids, None, mask).logits), nn.to_numpy(model(ids, None, mask).logits))


def test_decoding_does_not_recompile(model):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    state = model.init_state(2)
    with torch.no_grad():
        for step in range(20):
            ids = torch.full((2, 1), step)
            got = compiled(ids, state)
            assert_close(nn.to_numpy(got.logits), nn.to_numpy(model(ids, state).logits))
            state = got.state
    assert counter.frame_count == 1


def test_activation_checkpointing(model):
    from torch.utils.checkpoint import checkpoint

    ids = torch.as_tensor(token_ids(2, 20))
    loss_of(model(ids).logits, ids).backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    hidden = model.backbone.embeddings(ids)
    for layer in model.backbone.layers:
        hidden, _ = checkpoint(layer, hidden, use_reentrant=False)
    loss_of(model.lm_head(model.backbone.norm_f(hidden)), ids).backward()
    for name, p in model.named_parameters():
        assert_close(p.grad.numpy(), want[name].numpy(), what=name)


@pytest.mark.parametrize(("backend", "impl"), scan_params(("torch",)))
def test_autocast(backend, impl):
    """Projections in bfloat16, and what must stay in float32 stays in float32."""
    config = config_of(n_layer=2, scan=impl)
    model = build(nn, config, WEIGHTS)
    ids = torch.as_tensor(token_ids(2, 64))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(ids)
        loss_of(output.logits, ids).backward()
    assert output.logits.dtype == torch.float32
    assert all(layer.ssm.dtype == torch.float32 for layer in output.state.layers)
    assert_close(nn.to_numpy(output.logits), reference.logits(WEIGHTS, token_ids(2, 64)), "bfloat16")
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    more = torch.as_tensor(token_ids(2, 3))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(more, output.state).logits.isfinite().all()


def time_steps_of(mixer: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the scan makes of what a mixer gives it under autocast, (B, L, D)."""
    scan, seen = nn.selective_scan, []

    def watched(u: Any, delta: Any, *args: Any, delta_bias: Any = None, **options: Any) -> Any:
        seen.append(delta.float() if delta_bias is None else delta.float() + delta_bias)
        return scan(u, delta, *args, delta_bias=delta_bias, **options)

    monkeypatch.setattr(nn, "selective_scan", watched)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        mixer(torch.ones(1, 4, CONFIG.d_model))
    return nn.softplus(seen[-1])


def test_the_bias_of_time_steps_stays_in_float32_under_autocast(model, monkeypatch):
    """A bias of -4.6 is wrong by up to 1/64 in bfloat16, and so is the time step."""
    mixer = model.backbone.layers[0].mixer
    bias = torch.linspace(-4.8, -4.2, CONFIG.d_inner)
    with torch.no_grad():
        mixer.dt_proj.weight.zero_()
        mixer.dt_proj.bias.copy_(bias)
    want = torch.nn.functional.softplus(bias.double()).expand(1, 4, -1)
    assert ((time_steps_of(mixer, monkeypatch) / want - 1).abs() < 1e-6).all()


def test_what_stands_for_dt_proj_is_called_under_autocast(model):
    dt_proj = model.backbone.layers[0].mixer.dt_proj
    dt = torch.ones(1, 2, int(CONFIG.dt_rank), requires_grad=True)
    seen = []
    with torch.autocast("cpu", torch.bfloat16):
        assert nn.time_steps(dt_proj, dt)[1] is dt_proj.bias
        for kind in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
            handle = getattr(dt_proj, f"register_{kind}")(lambda *args: seen.append(args))
            delta, bias = nn.time_steps(dt_proj, dt)
            assert bias is None
            delta.sum().backward()
            assert seen.pop()
            handle.remove()
        dt_proj.forward = lambda x: x * 7
        assert (nn.time_steps(dt_proj, dt)[0] == 7).all()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # forward mode in torch uses it
def test_the_largest_values_inside_transforms():
    """Of logits, which NumPy looks through elsewhere."""
    values = torch.arange(12.0).reshape(2, 2, 3)
    for name in ("max", "argmax"):
        find = getattr(nn, name)
        got = torch.func.vmap(lambda rows, find=find: find(rows, axis=1))(values)
        torch.testing.assert_close(got, find(values, axis=2))
    with torch.autograd.forward_ad.dual_level():
        found = nn.max(torch.autograd.forward_ad.make_dual(values[0], values[1]), axis=1)
        tangent = torch.autograd.forward_ad.unpack_dual(found).tangent
    torch.testing.assert_close(tangent, values[1, :, 2])


@pytest.mark.parametrize(("backend", "impl"), scan_params(("torch",)))
def test_the_scan_stays_in_float32_under_autocast(backend, impl):
    from test_scan import arguments

    values = arguments(40)
    arrays = {name: torch.from_numpy(value) for name, value in values.items()}
    with torch.autocast("cpu", torch.bfloat16):
        y, final = nn.selective_scan(**arrays, delta_softplus=True, impl=impl)
    want = reference.scan(**values, delta_softplus=True)
    assert_close(y.numpy(), want[0])
    assert_close(final.numpy(), want[1])


def test_an_id_outside_the_vocabulary_in_a_tensor_is_refused(model):
    for bad in (101, -1):
        with pytest.raises(IndexError):
            model(torch.tensor([[1, bad]]))


def test_from_numpy_never_writes_to_the_callers_array(model):
    kept = {name: array.astype(np.float32) for name, array in WEIGHTS.items()}
    arrays = {name: array.copy() for name, array in kept.items()}
    state = {name: torch.from_numpy(array) for name, array in arrays.items()}
    model.load_state_dict(state)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    for name in kept:
        np.testing.assert_array_equal(arrays[name], kept[name])


DDP = """
import pathlib, sys
import torch
import torch.distributed as dist
import mambax

rank, folder = int(sys.argv[1]), pathlib.Path(sys.argv[2])
dist.init_process_group("gloo", init_method=(folder / "meet").as_uri(), rank=rank, world_size=2)
config = mambax.MambaLMConfig(d_model=8, n_layer=2, d_state=3, vocab_size=11)
model = torch.nn.parallel.DistributedDataParallel(mambax.from_config(config, backend="torch", seed=rank))
ids = torch.load(folder / "ids.pt")[rank::2]
optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
for _ in range(2):
    optimiser.zero_grad()
    logits = model(ids).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    optimiser.step()
torch.save(model.module.state_dict(), folder / f"{rank}.pt")
dist.destroy_process_group()
"""


def test_two_process_data_parallel_steps_are_one_process_on_the_whole_batch(tmp_path):
    ids = torch.as_tensor(token_ids(4, 12, vocab_size=11))
    torch.save(ids, tmp_path / "ids.pt")
    script = tmp_path / "step.py"
    script.write_text(DDP, encoding="utf-8")
    loopback = {"linux": "lo", "darwin": "lo0"}.get(sys.platform)
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"GLOO_SOCKET_IFNAME": loopback} if loopback else {})
    command = [sys.executable, "-W", "ignore", str(script)]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
        )
        for rank in range(2)
    ]
    try:
        for worker in workers:
            printed, _ = worker.communicate(timeout=180)
            assert worker.returncode == 0, printed.decode()
    finally:
        for worker in workers:
            worker.kill()

    config = mambax.MambaLMConfig(d_model=8, n_layer=2, d_state=3, vocab_size=11)
    model = mambax.from_config(config, backend="torch", seed=0)  # what rank 0 hands to all
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        optimiser.zero_grad()
        loss_of(model(ids).logits, ids).backward()
        optimiser.step()
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, want in model.state_dict().items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        assert_close(ranks[0][name].numpy(), want.numpy(), what=name, tolerance=FORWARD["float32"])
