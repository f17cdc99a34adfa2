"""The NumPy backend of mambax: the reference. Sequential, float64-capable, no autograd."""

from __future__ import annotations

from mambax.blocks import mix, time_steps
from mambax.decoding import stepper
from mambax_numpy.attention import attention
from mambax_numpy.describe import describe
from mambax_numpy.duality import gated_rms_norm, ssd, ssd_implementations
from mambax_numpy.experts import mixture
from mambax_numpy.fused import causal_conv1d, scan_implementations, selective_scan
from mambax_numpy.layers import CausalConv1d, Embedding, Linear, RMSNorm
from mambax_numpy.models import (
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
from mambax_numpy.module import Module, ModuleList, Parameter, parameters, set_parameters
from mambax_numpy.ops import *
from mambax_numpy.quantized import quantize, why_not_quantized
from mambax_numpy.recompute import recomputed, summed_over_chunks
from mambax_numpy.step import decode_step
