"""Families of text models that are served by their shape: a tiny model of each, by transformers' name of its type."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PreTrainedModel

_EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
_SHARED = {**_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16}
_GROUPED = {**_EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
_HEAD = {"head_dim": 8}
# What the configuration of each type needs beside `tiny`'s.
FULL: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "bitnet": {},
    "cohere": {"logit_scale": 1.0},
    "ernie4_5": _HEAD,
    "ernie4_5_moe": {**_EXPERTS, "moe_num_experts": 4, "moe_k": 2},
    "exaone": {},
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "gemma": _HEAD,
    "glm": _HEAD,
    "glm4": _HEAD,
    "glm4_moe": {**_GROUPED, **_HEAD},
    "gpt_neox": {"num_key_value_heads": 4},
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.7},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "helium": _HEAD,
    "hunyuan_v1_dense": _HEAD,
    "internlm3": _HEAD,
    "minimax_m2": {**_EXPERTS, "num_local_experts": 4, **_HEAD},
    "ministral3": _HEAD,
    "mixtral": {"num_local_experts": 4},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "persimmon": {"num_key_value_heads": 4},
    "phi": {},
    "phi3": {"partial_rotary_factor": 0.5},
    "phimoe": {"num_local_experts": 4},
    "qwen2_moe": _SHARED,
    "qwen3_moe": {**_SHARED, **_HEAD},
    "seed_oss": _HEAD,
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "solar_open": {**_GROUPED, **_HEAD},
    "stablelm": {},
    "starcoder2": {"sliding_window": None},
}

_WINDOW = {"sliding_window": 9}
_SLIDES = {**_WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_SUMS = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
_DELTA = {**_SUMS, "linear_num_key_heads": 2, "linear_num_value_heads": 4, **_HEAD}
_DELTA |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
# Layers that slide or sum up beside one that attends to everything.
MIXED: dict[str, dict[str, Any]] = {
    "afmoe": {**_SLIDES, **_SHARED, **_HEAD, "num_dense_layers": 1},
    "cohere2": {**_SLIDES, "logit_scale": 1.0},
    "cwm": {**_SLIDES, **_HEAD},
    "exaone4": _SLIDES,
    "gemma2": {**_SLIDES, **_HEAD, "attn_logit_softcapping": 2.0},
    "gemma3_text": {**_SLIDES, **_HEAD},
    "gpt_oss": {**_SLIDES, **_HEAD, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granite_swa": {**_SLIDES, **_HEAD},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "llama4_text": {
        "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
        "attention_chunk_size": 8,
        "num_local_experts": 4,
        "intermediate_size_mlp": 48,
        **_HEAD,
    },
    "mimo_v2_flash": {**_SLIDES, **_GROUPED, **_HEAD, "v_head_dim": 8},
    "ministral": {**_SLIDES, **_HEAD},
    "olmo3": _SLIDES,
    "olmo_hybrid": _DELTA,
    "qwen2": {**_SLIDES, "use_sliding_window": True},
    "qwen3": {**_SLIDES, **_HEAD, "use_sliding_window": True},
    "qwen3_next": {**_DELTA, **_SHARED},
    "vaultgemma": {**_SLIDES, **_HEAD},
}
_ALL_SLIDE = {"sliding_window": 40, "layer_types": ["sliding_attention"] * 3, "use_sliding_window": True}
# Layers that slide, all of them: served up to where the window ends.
WINDOWED: dict[str, dict[str, Any]] = {
    "mistral, windows": {"sliding_window": 40},
    "qwen2, windows": _ALL_SLIDE,
    "starcoder2, windows": {"sliding_window": 40},
}
EVERY = {
    **FULL,
    **WINDOWED,
    **{f"{name}, mixed" if name in ("qwen2", "qwen3") else name: more for name, more in MIXED.items()},
}
# Much like others of the list: only the thorough profile takes them (CONTRIBUTING.md).
ALIKE = {"afmoe", "apertus", "bitnet", "cwm", "exaone", "flex_olmo", "granite_swa", "granitemoe", "hunyuan_v1_dense"}
ALIKE |= {
    "internlm3",
    "minimax_m2",
    "ministral",
    "olmoe",
    "persimmon",
    "phimoe",
    "seed_oss",
    "solar_open",
    "vaultgemma",
}


def build(name: str, text: dict[str, Any]) -> PreTrainedModel:
    """A model of a family with random weights, from what all configurations share."""
    config = transformers.AutoConfig.for_model(name.partition(",")[0], **{**text, **EVERY[name]})
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config)
    return model
