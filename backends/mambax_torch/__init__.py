"""The PyTorch backend of mambax: CPU, CUDA and MPS. Models are real ``torch.nn.Module`` objects."""

from __future__ import annotations

from mambax_torch.attention import attention
from mambax_torch.describe import describe
from mambax_torch.duality import gated_rms_norm, ssd, ssd_implementations
from mambax_torch.experts import mixture
from mambax_torch.fused import causal_conv1d, scan_implementations, selective_scan
from mambax_torch.graph import stepper
from mambax_torch.layers import CausalConv1d, Embedding, Linear, RMSNorm, time_steps
from mambax_torch.mix_ops import mix
from mambax_torch.models import (
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
from mambax_torch.module import Module, ModuleList, Parameter, parameters, set_parameters
from mambax_torch.ops import *
from mambax_torch.quantized import quantize, why_not_quantized
from mambax_torch.recompute import recomputed, summed_over_chunks
from mambax_torch.step import decode_step
