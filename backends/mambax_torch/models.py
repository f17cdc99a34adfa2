"""The model definitions of mambax bound to PyTorch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch.utils._pytree import register_pytree_node

import mambax_torch
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
from mambax_torch.layers import Embedding, Linear
from mambax_torch.module import Module
from mambax_torch.quantized import MovedWhole


class InferenceParams(state.InferenceParams):
    nn: ClassVar[Backend] = mambax_torch


class MambaMixer(blocks.MambaMixer, Module):
    nn: ClassVar[Backend] = mambax_torch


class Mamba2Mixer(mamba2.Mamba2Mixer, Module):
    nn: ClassVar[Backend] = mambax_torch


class BiMambaMixer(bidirectional.BidirectionalMixer, Module):
    nn: ClassVar[Backend] = mambax_torch
    direction_cls = MambaMixer
    tied = False


class TiedBiMambaMixer(bidirectional.BidirectionalMixer, Module):
    nn: ClassVar[Backend] = mambax_torch
    direction_cls = MambaMixer
    tied = True


class BiMamba2Mixer(bidirectional.BidirectionalMixer, Module):
    nn: ClassVar[Backend] = mambax_torch
    direction_cls = Mamba2Mixer
    tied = False


class TiedBiMamba2Mixer(bidirectional.BidirectionalMixer, Module):
    nn: ClassVar[Backend] = mambax_torch
    direction_cls = Mamba2Mixer
    tied = True


class AttentionMixer(attention.AttentionMixer, Module):
    nn: ClassVar[Backend] = mambax_torch


class MHAMixer(official.MHAMixer, Module):
    nn: ClassVar[Backend] = mambax_torch


class ParallelMixer(parallel.ParallelMixer, Module):
    nn: ClassVar[Backend] = mambax_torch
    ssm_cls = Mamba2Mixer
    attention_cls = AttentionMixer


class GatedMLPMixer(official.GatedMLPMixer, Module):
    nn: ClassVar[Backend] = mambax_torch


class MLPMixer(mlp.MLPMixer, Module):
    nn: ClassVar[Backend] = mambax_torch


class MoEMixer(experts.MoEMixer, Module):
    nn: ClassVar[Backend] = mambax_torch
    expert_cls = MLPMixer


class FusedMLP(mlp.FusedMLP, Module):
    nn: ClassVar[Backend] = mambax_torch


class ExpertWeights(experts.ExpertWeights, Module):
    nn: ClassVar[Backend] = mambax_torch


class Router(experts.Router, Module):
    nn: ClassVar[Backend] = mambax_torch


class FusedExperts(experts.FusedExperts, Module):
    nn: ClassVar[Backend] = mambax_torch
    weights_cls = ExpertWeights
    router_cls = Router


class SharedMoEMixer(experts.SharedMoEMixer, Module):
    nn: ClassVar[Backend] = mambax_torch
    mlp_cls = FusedMLP
    experts_cls = FusedExperts


class SigmoidRouter(sigmoid_experts.SigmoidRouter, Module):
    nn: ClassVar[Backend] = mambax_torch


class SigmoidMoEMixer(sigmoid_experts.SigmoidMoEMixer, Module):
    nn: ClassVar[Backend] = mambax_torch
    expert_cls = MLPMixer
    router_cls = SigmoidRouter


class Block(blocks.Block, Module):
    nn: ClassVar[Backend] = mambax_torch
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
    nn: ClassVar[Backend] = mambax_torch


class SharedAttention(shared_blocks.SharedAttention, Module):
    nn: ClassVar[Backend] = mambax_torch
    adapter_cls = Adapter


class SharedMLP(shared_blocks.SharedMLP, Module):
    nn: ClassVar[Backend] = mambax_torch
    adapter_cls = Adapter


class SharedBlock(shared_blocks.SharedBlock, Module):
    nn: ClassVar[Backend] = mambax_torch
    attention_cls = SharedAttention
    mlp_cls = SharedMLP


class MambaEncoder(encoder.MambaEncoder, MovedWhole):
    nn: ClassVar[Backend] = mambax_torch
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


class MambaForCausalLM(models.MambaForCausalLM, MovedWhole):
    nn: ClassVar[Backend] = mambax_torch
    backbone_cls = MambaBackbone
    head_cls = MambaLMHead


class MambaForSequenceClassification(models.MambaForSequenceClassification, MovedWhole):
    nn: ClassVar[Backend] = mambax_torch
    backbone_cls = MambaBackbone
    head_cls = MambaClassificationHead


class MambaForFeatureExtraction(models.MambaForFeatureExtraction, MovedWhole):
    nn: ClassVar[Backend] = mambax_torch
    backbone_cls = MambaBackbone


def _flatten(params: InferenceParams) -> tuple[list[object], None]:
    return [params.layers, params.tokens_seen], None


def _unflatten(children: Iterable[Any], context: None) -> InferenceParams:
    return InferenceParams(*children)


# So that DDP, FSDP, checkpointing, vmap and export find the tensors of a state among inputs and outputs.
register_pytree_node(
    InferenceParams, _flatten, _unflatten, serialized_type_name="mambax_torch.models.InferenceParams"
)
