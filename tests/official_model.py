"""The language model of the official package as formulas, in float64: Mamba-2 with attention and MLPs between.

transformers has no such model, and the official package needs a GPU. This one has its parameter names and reads
and writes its files. It is in torch for the gradients alone, and nothing of mambax is in it. The recurrence is a
product with a lower triangular matrix, without a state.

Dimensions: B batch, L length, H heads, P head_dim, G groups, N d_state.

Source: ``mamba_ssm/models/mixer_seq_simple.py``, ``modules/mamba2.py``, ``modules/mha.py`` and ``modules/mlp.py``.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * weight.double()


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return functional.linear(x, layer.weight.double(), None if layer.bias is None else layer.bias.double())


def convolved(conv1d: nn.Conv1d, x: Tensor) -> Tensor:
    """Every channel by itself: output t is of inputs t - K + 1 to t, those before the first being zero."""
    (kernel,) = conv1d.kernel_size
    padded = functional.pad(x.transpose(1, 2), (kernel - 1, 0))  # (B, C, K - 1 + L)
    bias = None if conv1d.bias is None else conv1d.bias.double()
    return functional.conv1d(padded, conv1d.weight.double(), bias, groups=conv1d.groups).transpose(1, 2)


def depthwise(channels: int, kernel: int, bias: bool = True) -> nn.Conv1d:
    return nn.Conv1d(channels, channels, kernel, groups=channels, bias=bias)


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class Mamba2(nn.Module):
    def __init__(self, d_model: int, d_state: int, d_conv: int, expand: int, headdim: int, ngroups: int) -> None:
        super().__init__()
        inner = expand * d_model
        heads, channels = inner // headdim, inner + 2 * ngroups * d_state
        self.sizes = heads, headdim, ngroups, d_state
        self.in_proj = nn.Linear(d_model, inner + channels + heads, bias=False)
        self.conv1d = depthwise(channels, d_conv)
        self.dt_bias = nn.Parameter(torch.linspace(-4.0, -1.0, heads))
        self.A_log = nn.Parameter(torch.log(torch.linspace(1.0, 9.0, heads)))
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = Norm(inner)
        self.out_proj = nn.Linear(inner, d_model, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        heads, width, groups, states = self.sizes
        batch, length, _ = u.shape
        inner = heads * width
        z, xBC, dt = linear(self.in_proj, u).split([inner, inner + 2 * groups * states, heads], -1)
        xBC = functional.silu(convolved(self.conv1d, xBC))
        x, B, C = xBC.split([inner, groups * states, groups * states], -1)
        x = x.reshape(batch, length, heads, width)
        B, C = (m.reshape(batch, length, groups, states).repeat_interleave(heads // groups, 2) for m in (B, C))
        dt = functional.softplus(dt + self.dt_bias.double())  # (B, L, H)
        total = (dt * -self.A_log.double().exp()).cumsum(1).transpose(1, 2)  # (B, H, L)
        earlier = torch.ones(length, length, dtype=torch.bool).tril()
        decay = (total[..., :, None] - total[..., None, :]).masked_fill(~earlier, -math.inf).exp()
        weights = torch.einsum("bthn,bshn->bhts", C, B) * decay
        y = torch.einsum("bhts,bsh,bshp->bthp", weights, dt, x) + self.D.double()[:, None] * x
        y = (y.reshape(batch, length, inner) * functional.silu(z)).reshape(batch, length, groups, -1)
        y = y / torch.sqrt((y * y).mean(-1, keepdim=True) + 1e-5)
        return linear(self.out_proj, y.reshape(batch, length, inner) * self.norm.weight.double())


class MHA(nn.Module):
    def __init__(self, d_model: int, cfg: dict[str, Any]) -> None:
        super().__init__()
        self.cfg = cfg
        heads, keys, width = cfg["num_heads"], cfg["num_heads_kv"], cfg["head_dim"]
        channels = (heads + 2 * keys) * width
        self.in_proj = nn.Linear(d_model, channels, bias=cfg["qkv_proj_bias"])
        if cfg["d_conv"]:
            self.conv1d = depthwise(channels, cfg["d_conv"])
        self.out_proj = nn.Linear(heads * width, d_model, bias=cfg["out_proj_bias"])

    def forward(self, u: Tensor) -> Tensor:
        cfg, (batch, length, _) = self.cfg, u.shape
        heads, keys, width = cfg["num_heads"], cfg["num_heads_kv"], cfg["head_dim"]
        qkv = linear(self.in_proj, u)
        if cfg["d_conv"]:
            qkv = convolved(self.conv1d, qkv)
        parts = qkv.split([heads * width, keys * width, keys * width], -1)
        q, k, v = (part.reshape(batch, length, -1, width) for part in parts)
        if cfg["rotary_emb_dim"]:
            q, k = (self.turned(x) for x in (q, k))
        k, v = (x.repeat_interleave(heads // keys, 2) for x in (k, v))
        scores = torch.einsum("bthp,bshp->bhts", q, k) * (cfg.get("softmax_scale") or width**-0.5)
        earlier = torch.ones(length, length, dtype=torch.bool).tril()
        weights = scores.masked_fill(~earlier, -math.inf).softmax(-1)
        return linear(self.out_proj, torch.einsum("bhts,bshp->bthp", weights, v).reshape(batch, length, -1))

    def turned(self, x: Tensor) -> Tensor:
        """The pair (i, i + R / 2) of the first R channels as a complex number, turned by t 10000^(-2 i / R)."""
        width = self.cfg["rotary_emb_dim"]
        pairs = torch.complex(x[..., : width // 2], x[..., width // 2 : width])
        frequency = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64) * 2 / width)
        angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * frequency
        pairs = pairs * torch.polar(torch.ones_like(angle), angle)[:, None]
        return torch.cat([pairs.real, pairs.imag, x[..., width:]], -1)


class GatedMLP(nn.Module):
    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        width = math.ceil(width / 128) * 128
        self.fc1 = nn.Linear(d_model, 2 * width, bias=False)
        self.fc2 = nn.Linear(width, d_model, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        y, gate = linear(self.fc1, u).chunk(2, -1)
        return linear(self.fc2, y * functional.silu(gate))


class Layer(nn.Module):
    def __init__(self, raw: dict[str, Any], number: int) -> None:
        super().__init__()
        d_model = raw["d_model"]
        self.norm = Norm(d_model)
        sizes = {name: raw["ssm_cfg"][name] for name in ("d_state", "d_conv", "expand", "headdim", "ngroups")}
        attends = number in raw["attn_layer_idx"]
        self.mixer = MHA(d_model, raw["attn_cfg"]) if attends else Mamba2(d_model, **sizes)
        if raw["d_intermediate"]:
            self.norm2, self.mlp = Norm(d_model), GatedMLP(d_model, raw["d_intermediate"])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(rms_norm(x, self.norm.weight))
        return x + self.mlp(rms_norm(x, self.norm2.weight)) if hasattr(self, "mlp") else x


class Backbone(nn.Module):
    def __init__(self, raw: dict[str, Any], vocab_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, raw["d_model"])
        self.layers = nn.ModuleList([Layer(raw, i) for i in range(raw["n_layer"])])
        self.norm_f = Norm(raw["d_model"])


class OfficialModel(nn.Module):
    """``MambaLMHeadModel`` for a ``config.json``, called as a model of transformers is."""

    def __init__(self, raw: dict[str, Any]) -> None:
        super().__init__()
        self.raw = raw
        multiple = raw["pad_vocab_size_multiple"]
        self.config = SimpleNamespace(vocab_size=math.ceil(raw["vocab_size"] / multiple) * multiple)
        self.backbone = Backbone(raw, self.config.vocab_size)
        self.lm_head = nn.Linear(raw["d_model"], self.config.vocab_size, bias=False)
        if raw["tie_embeddings"]:
            self.lm_head.weight = self.backbone.embedding.weight

    def forward(self, ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        x = functional.embedding(ids, self.backbone.embedding.weight.double())
        for layer in self.backbone.layers:
            x = layer(x)
        return SimpleNamespace(logits=linear(self.lm_head, rms_norm(x, self.backbone.norm_f.weight)))

    def generate(self, ids: Tensor, *, max_new_tokens: int, **options: Any) -> Tensor:
        for _ in range(max_new_tokens):
            ids = torch.cat([ids, self(ids).logits[:, -1:].argmax(-1)], 1)
        return ids

    def save_pretrained(self, folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(self.raw), encoding="utf-8")
        torch.save(self.state_dict(), folder / "pytorch_model.bin")

    @classmethod
    def from_pretrained(cls, folder: Path, output_loading_info: bool = False) -> Any:
        """Of what mambax saved: the official names, a tied head once."""
        from safetensors.torch import load_file

        model = cls(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        missing, unexpected = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
        missing = [name for name in missing if not (name == "lm_head.weight" and model.raw["tie_embeddings"])]
        return model, {"missing": missing, "unexpected": unexpected}
