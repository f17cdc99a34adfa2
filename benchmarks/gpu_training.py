"""A training step on the GPU beside others.

Weights are random; mamba_ssm and transformers get those of mambax.

Dimensions: B batch, L length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu_context import Context
from benchmarks.gpu_models import mamba_ssm_model, mambax_model, token_ids, transformers_model, weights_of
from benchmarks.gpu_rivals import Rival
from benchmarks.harness import Case


def cases(c: Context) -> Iterator[Case]:
    """Forward under bfloat16 autocast, cross-entropy, backward, AdamW; with and without gradient checkpointing."""
    for name, (batch, length) in c.plan.training:
        ids = token_ids(c, name, batch, length + 1)
        for again in (False, True):
            job = {
                "kind": "training", "model": name, "batch": batch, "length": length, "checkpointing": again,
                "precision": "bfloat16",
            }  # fmt: skip
            rivals = [
                Rival(label, training_step(c, make, name, ids, again), gradients=True)
                for label, make in TRAINED.items()
            ]
            yield c.arena.compare("training", job, rivals, alone=True)


def _ours(c: Context, name: str, again: bool) -> tuple[Any, Callable[[Any], Any]]:
    model = mambax_model(c, name, torch.float32).train()
    model.backbone.gradient_checkpointing = again
    return model, lambda ids: model(ids).logits


def _mamba_ssm(c: Context, name: str, again: bool) -> tuple[Any, Callable[[Any], Any]]:
    """mamba_ssm has no checkpointing of its own: its blocks are wrapped in torch's."""
    from torch.utils.checkpoint import checkpoint

    model = mamba_ssm_model(c, name, torch.float32, weights_of(mambax_model(c, name, torch.float32))).train()
    for layer in model.backbone.layers if again else ():
        forward = layer.forward
        layer.forward = lambda *given, f=forward, **options: checkpoint(f, *given, use_reentrant=False, **options)
    return model, lambda ids: model(ids).logits


def _transformers(c: Context, name: str, again: bool) -> tuple[Any, Callable[[Any], Any]]:
    weights = weights_of(mambax_model(c, name, torch.float32))
    model = transformers_model(c, name, torch.float32, weights).train()
    if again:
        model.gradient_checkpointing_enable()
    return model, lambda ids: model(ids, use_cache=False).logits


def training_step(
    c: Context, make: Callable[..., tuple[Any, Callable[[Any], Any]]], name: str, ids: torch.Tensor, again: bool
) -> Callable[[], Callable[[], Any]]:
    """What makes the step: loss under autocast, backward, optimiser. `make` makes a model and what it computes."""

    def made() -> Callable[[], Any]:
        model, logits = make(c, name, again)
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=c.plan.device == "cuda")

        def run() -> Any:
            with torch.autocast(c.plan.device, torch.bfloat16):  # and nothing holds the logits longer
                loss = F.cross_entropy(logits(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            return loss.detach()

        return run

    return made


TRAINED: dict[str, Callable[..., tuple[Any, Callable[[Any], Any]]]] = {
    "mambax": _ours,
    "mamba_ssm": _mamba_ssm,
    "transformers": _transformers,
}
"""Label -> what makes (model, from ids to logits)."""
