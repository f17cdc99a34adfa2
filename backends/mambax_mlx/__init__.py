"""The MLX backend of mambax: Apple GPU, CPU and CUDA. Models are real ``mlx.nn.Module`` objects."""

from __future__ import annotations

from mambax.blocks import mix, time_steps
from mambax.decoding import stepper
from mambax_mlx.attention import attention
from mambax_mlx.describe import describe
from mambax_mlx.duality import gated_rms_norm, ssd, ssd_implementations
from mambax_mlx.experts import mixture
from mambax_mlx.fused import causal_conv1d, scan_implementations, selective_scan
from mambax_mlx.layers import CausalConv1d, Embedding, Linear, RMSNorm
from mambax_mlx.models import (
    Block,
    InferenceParams,
    MambaBackbone,
    MambaClassificationHead,
    MambaEmbedding,
    MambaEncoder,
    MambaForCausalLM,
    MambaForFeatureExtraction,
    MambaForSequenceClassification,
    MambaLMHead,
    MambaMixer,
)
from mambax_mlx.module import Module, ModuleList, Parameter, parameters, set_parameters
from mambax_mlx.ops import *
from mambax_mlx.quantized import quantize, why_not_quantized
from mambax_mlx.recompute import recomputed, summed_over_chunks
from mambax_mlx.step import decode_step
