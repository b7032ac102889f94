"""Architectures of transformers, from small configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo_models.case import BATCH, Case, Factory, images, tokens
from zoo_models.missing_operators import define_missing_operators

define_missing_operators()

import transformers  # noqa: E402

NARROW = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
WORDS = {"vocab_size": 100, "max_position_embeddings": 64}
PICTURE = {"image_size": 32, "patch_size": 8}
SPEECH = {
    **NARROW, "conv_dim": (32, 32, 32), "conv_kernel": (10, 3, 3), "conv_stride": (5, 2, 2),
    "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
    "vocab_size": 32, "mask_time_prob": 0.0, "apply_spec_augment": False,
}  # fmt: skip


def built(architecture: str, options: dict[str, Any], inputs: Callable[[], dict[str, Tensor]]) -> Factory:
    """A factory for a class of transformers with its own configuration class."""

    def make() -> Case:
        model = getattr(transformers, architecture)
        return Case(model(model.config_class(**options)), (), inputs())

    return make


def text() -> dict[str, Tensor]:
    """Tokens and a mask that hides the end of the second row."""
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[1, -4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def causal_text() -> dict[str, Tensor]:
    """Tokens."""
    return {"input_ids": tokens()}


def pairs() -> dict[str, Tensor]:
    """Tokens to read and tokens to write."""
    return {"input_ids": tokens(), "decoder_input_ids": tokens(8)}


def pixels(size: int) -> Callable[[], dict[str, Tensor]]:
    """Images of this size."""
    return lambda: {"pixel_values": images(size)}


def waves() -> dict[str, Tensor]:
    """A twentieth of a second at 16 kHz."""
    return {"input_values": torch.randn(BATCH, 800)}


def spectrogram() -> dict[str, Tensor]:
    """80 bands, and tokens to write."""
    return {"input_features": torch.randn(BATCH, 80, 64), "decoder_input_ids": tokens(8)}


def captioned() -> dict[str, Tensor]:
    """Images and tokens."""
    return {**text(), "pixel_values": images(32)}


def decoder(architecture: str, **options: Any) -> Factory:
    """A causal language model in the manner of Llama, with fewer heads for keys than for queries."""
    return built(
        architecture,
        {**NARROW, **WORDS, "num_key_value_heads": 2, "use_cache": False, "pad_token_id": 0, **options},
        causal_text,
    )


MODELS: dict[str, Factory] = {
    "bert": built("BertModel", {**NARROW, **WORDS}, text),
    "bert_classifier": built("BertForSequenceClassification", {**NARROW, **WORDS}, text),
    "distilbert": built(
        "DistilBertForMaskedLM", {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, **WORDS}, text
    ),
    "roberta": built("RobertaForMaskedLM", {**NARROW, **WORDS}, text),
    "electra": built("ElectraForTokenClassification", {**NARROW, **WORDS, "embedding_size": 32}, text),
    "albert": built("AlbertModel", {**NARROW, **WORDS, "embedding_size": 32}, text),
    "mpnet": built("MPNetModel", {**NARROW, **WORDS}, text),
    "deberta_v2": built(
        "DebertaV2Model",
        {**NARROW, **WORDS, "relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]},
        text,
    ),
    "gpt2": built(
        "GPT2LMHeadModel",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 100, "use_cache": False},
        causal_text,
    ),
    "gpt_neox": built("GPTNeoXForCausalLM", {**NARROW, **WORDS, "use_cache": False}, causal_text),
    "opt": built(
        "OPTForCausalLM",
        {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 128, "word_embed_proj_dim": 64,
         **WORDS, "use_cache": False},
        causal_text,
    ),
    "bloom": built(
        "BloomForCausalLM",
        {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100, "use_cache": False},
        causal_text,
    ),
    "llama": decoder("LlamaForCausalLM"),
    "mistral": decoder("MistralForCausalLM", sliding_window=8),
    "qwen2": decoder("Qwen2ForCausalLM"),
    "qwen3": decoder("Qwen3ForCausalLM", head_dim=16),
    "gemma": decoder("GemmaForCausalLM", head_dim=16),
    "phi3": decoder("Phi3ForCausalLM"),
    "mixtral": decoder("MixtralForCausalLM", num_local_experts=4),
    "t5": built(
        "T5ForConditionalGeneration",
        {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 100,
         "use_cache": False},
        pairs,
    ),
    "bart": built(
        "BartForConditionalGeneration",
        {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, **WORDS, "use_cache": False},
        pairs,
    ),
    "vit": built("ViTForImageClassification", {**NARROW, **PICTURE}, pixels(32)),
    "deit": built("DeiTForImageClassification", {**NARROW, **PICTURE}, pixels(32)),
    "beit": built("BeitForImageClassification", {**NARROW, **PICTURE, "use_relative_position_bias": True}, pixels(32)),
    "dinov2": built("Dinov2ForImageClassification", {**NARROW, **PICTURE}, pixels(32)),
    "swin": built(
        "SwinForImageClassification",
        {"image_size": 32, "patch_size": 2, "embed_dim": 32, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4},
        pixels(32),
    ),
    "convnext": built(
        "ConvNextForImageClassification", {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}, pixels(64)
    ),
    "resnet": built(
        "ResNetForImageClassification",
        {"embedding_size": 16, "hidden_sizes": [32, 48, 64, 96], "depths": [1, 1, 1, 1]},
        pixels(64),
    ),
    "segformer": built(
        "SegformerForSemanticSegmentation",
        {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 48, 64], "num_attention_heads": [1, 2, 3, 4],
         "decoder_hidden_size": 64},
        pixels(64),
    ),
    "mobilevit": built(
        "MobileViTForImageClassification",
        {"hidden_sizes": [24, 32, 48], "neck_hidden_sizes": [8, 16, 24, 32, 40, 48, 96], "image_size": 128},
        pixels(128),  # attention over one patch alone would not depend on queries and keys
    ),
    "mobilenet_v2": built(
        "MobileNetV2ForImageClassification", {"depth_multiplier": 0.35, "image_size": 64}, pixels(64)
    ),
    "regnet": built(
        "RegNetForImageClassification",
        {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1], "groups_width": 8},
        pixels(64),
    ),
    "poolformer": built(
        "PoolFormerForImageClassification", {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}, pixels(64)
    ),
    "whisper": built(
        "WhisperForConditionalGeneration",
        {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "vocab_size": 100,
         "num_mel_bins": 80, "max_source_positions": 32, "max_target_positions": 16, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "use_cache": False,
         "suppress_tokens": None, "begin_suppress_tokens": None},
        spectrogram,
    ),
    "wav2vec2": built("Wav2Vec2ForCTC", SPEECH, waves),
    "hubert": built("HubertForCTC", SPEECH, waves),
    "clip": built(
        "CLIPModel",
        {"text_config": {**NARROW, **WORDS, "eos_token_id": 2}, "vision_config": {**NARROW, **PICTURE},
         "projection_dim": 32},
        captioned,
    ),
    "siglip": built(
        "SiglipModel", {"text_config": {**NARROW, **WORDS}, "vision_config": {**NARROW, **PICTURE}}, captioned
    ),
    "mamba": built(
        "MambaForCausalLM",
        {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 100, "use_cache": False},
        causal_text,
    ),
}  # fmt: skip
