"""The model definitions of mambax bound to MLX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import mambax_mlx
from mambax import (
    attention,
    bidirectional,
    blocks,
    encoder,
    experts,
    mamba2,
    mlp,
    models,
    official,
    parallel,
    shared_blocks,
    sigmoid_experts,
    state,
)
from mambax.backend import Backend
from mambax_mlx.layers import Embedding, Linear
from mambax_mlx.module import Module


class InferenceParams(state.InferenceParams):
    nn: ClassVar[Backend] = mambax_mlx


class MambaMixer(blocks.MambaMixer, Module):
    nn: ClassVar[Backend] = mambax_mlx


class Mamba2Mixer(mamba2.Mamba2Mixer, Module):
    nn: ClassVar[Backend] = mambax_mlx


class BiMambaMixer(bidirectional.BidirectionalMixer, Module):
    nn: ClassVar[Backend] = mambax_mlx
    direction_cls = MambaMixer
    tied = False


class TiedBiMambaMixer(bidirectional.BidirectionalMixer, Module):
    nn: ClassVar[Backend] = mambax_mlx
    direction_cls = MambaMixer
    tied = True


class BiMamba2Mixer(bidirectional.BidirectionalMixer, Module):
    nn: ClassVar[Backend] = mambax_mlx
    direction_cls = Mamba2Mixer
    tied = False


class TiedBiMamba2Mixer(bidirectional.BidirectionalMixer, Module):
    nn: ClassVar[Backend] = mambax_mlx
    direction_cls = Mamba2Mixer
    tied = True


class AttentionMixer(attention.AttentionMixer, Module):
    nn: ClassVar[Backend] = mambax_mlx


class MHAMixer(official.MHAMixer, Module):
    nn: ClassVar[Backend] = mambax_mlx


class ParallelMixer(parallel.ParallelMixer, Module):
    nn: ClassVar[Backend] = mambax_mlx
    ssm_cls = Mamba2Mixer
    attention_cls = AttentionMixer


class GatedMLPMixer(official.GatedMLPMixer, Module):
    nn: ClassVar[Backend] = mambax_mlx


class MLPMixer(mlp.MLPMixer, Module):
    nn: ClassVar[Backend] = mambax_mlx


class MoEMixer(experts.MoEMixer, Module):
    nn: ClassVar[Backend] = mambax_mlx
    expert_cls = MLPMixer


class FusedMLP(mlp.FusedMLP, Module):
    nn: ClassVar[Backend] = mambax_mlx


class ExpertWeights(experts.ExpertWeights, Module):
    nn: ClassVar[Backend] = mambax_mlx


class Router(experts.Router, Module):
    nn: ClassVar[Backend] = mambax_mlx


class FusedExperts(experts.FusedExperts, Module):
    nn: ClassVar[Backend] = mambax_mlx
    weights_cls = ExpertWeights
    router_cls = Router


class SharedMoEMixer(experts.SharedMoEMixer, Module):
    nn: ClassVar[Backend] = mambax_mlx
    mlp_cls = FusedMLP
    experts_cls = FusedExperts


class SigmoidRouter(sigmoid_experts.SigmoidRouter, Module):
    nn: ClassVar[Backend] = mambax_mlx


class SigmoidMoEMixer(sigmoid_experts.SigmoidMoEMixer, Module):
    nn: ClassVar[Backend] = mambax_mlx
    expert_cls = MLPMixer
    router_cls = SigmoidRouter


class Block(blocks.Block, Module):
    nn: ClassVar[Backend] = mambax_mlx
    mixers: ClassVar[Mapping[str, Any]] = {
        "mamba": MambaMixer,
        "mamba2": Mamba2Mixer,
        "bimamba": BiMambaMixer,
        "bimamba_tied": TiedBiMambaMixer,
        "bimamba2": BiMamba2Mixer,
        "bimamba2_tied": TiedBiMamba2Mixer,
        "attention": AttentionMixer,
        "mha": MHAMixer,
        "parallel": ParallelMixer,
        "mlp": MLPMixer,
        "gated_mlp": GatedMLPMixer,
        "moe": MoEMixer,
        "shared_moe": SharedMoEMixer,
        "sigmoid_moe": SigmoidMoEMixer,
    }


class Adapter(shared_blocks.Adapter, Module):
    nn: ClassVar[Backend] = mambax_mlx


class SharedAttention(shared_blocks.SharedAttention, Module):
    nn: ClassVar[Backend] = mambax_mlx
    adapter_cls = Adapter


class SharedMLP(shared_blocks.SharedMLP, Module):
    nn: ClassVar[Backend] = mambax_mlx
    adapter_cls = Adapter


class SharedBlock(shared_blocks.SharedBlock, Module):
    nn: ClassVar[Backend] = mambax_mlx
    attention_cls = SharedAttention
    mlp_cls = SharedMLP


class MambaEncoder(encoder.MambaEncoder, Module):
    nn: ClassVar[Backend] = mambax_mlx
    block_cls = Block
    shared_cls = SharedBlock
    state_cls = InferenceParams


class MambaEmbedding(models.MambaEmbedding, Embedding):
    pass


class MambaLMHead(models.MambaLMHead, Linear):
    pass


class MambaClassificationHead(models.MambaClassificationHead, Linear):
    pass


class MambaBackbone(models.MambaBackbone, MambaEncoder):
    embedding_cls = MambaEmbedding


class MambaForCausalLM(models.MambaForCausalLM, Module):
    nn: ClassVar[Backend] = mambax_mlx
    backbone_cls = MambaBackbone
    head_cls = MambaLMHead


class MambaForSequenceClassification(models.MambaForSequenceClassification, Module):
    nn: ClassVar[Backend] = mambax_mlx
    backbone_cls = MambaBackbone
    head_cls = MambaClassificationHead


class MambaForFeatureExtraction(models.MambaForFeatureExtraction, Module):
    nn: ClassVar[Backend] = mambax_mlx
    backbone_cls = MambaBackbone
