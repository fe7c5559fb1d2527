"""Sizes of the text and vision towers."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from bdm_jax.models.values import check, pick, plain


@dataclass(frozen=True)
class CLIPTextConfig:
    """CLIP's text tower (causal, pre-norm). `projection_dim` is the width of its pooled output where it has a
    projection (transformers' CLIPTextModelWithProjection), else None.
    """

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    bos_token_id: int = 49406
    eos_token_id: int = 49407
    pad_token_id: int = 49407
    projection_dim: int | None = None


@dataclass(frozen=True)
class CLIPVisionConfig:
    """CLIP's vision tower with its projection; the sizes are those of ViT-H/14, which IP-Adapters for SD1.5 use."""

    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_hidden_layers: int = 32
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    projection_dim: int = 1024
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5


@dataclass(frozen=True)
class RobertaConfig:
    """The text tower of Chinese-CLIP: a BERT encoder without pooler (post-norm, bidirectional). `projection_dim` is the
    width of the joint space that its pooled text is projected to, None where it is the first token's state as it is.
    """

    vocab_size: int = 21128
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    projection_dim: int | None = None


@dataclass(frozen=True)
class ChatGLMConfig:
    """ChatGLM3 as a text encoder (Kolors'); the sizes are those of ChatGLM3-6B.

    Attributes:
      kv_channels: of a head. multi_query_group_num: heads of the keys and values. layernorm_epsilon: of the RMS norms.
    """

    vocab_size: int = 65024
    hidden_size: int = 4096
    intermediate_size: int = 13696
    num_hidden_layers: int = 28
    num_attention_heads: int = 32
    kv_channels: int = 128
    multi_query_group_num: int = 2
    layernorm_epsilon: float = 1e-5

    def __post_init__(self):
        if self.num_attention_heads % self.multi_query_group_num:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of multi_query_group_num "
                f"({self.multi_query_group_num})"
            )
        if self.kv_channels % 4:
            raise ValueError(f"kv_channels {self.kv_channels} must be a multiple of 4: half of them turn in pairs")


@dataclass(frozen=True)
class TextStatesConfig:
    """States of texts that were read before, in their text encoder's place.

    Attributes:
      texts, length: how many windows of how many tokens.
      hidden_size: of the states. projection_dim: of the pooled texts; None where there are none.
      vocab_size: of the text encoder that read them.
      num_hidden_layers: as many as a reader counts from the last, so that the one it reads is the only one here.
    """

    texts: int
    length: int
    hidden_size: int
    vocab_size: int
    num_hidden_layers: int = 1
    projection_dim: int | None = None


CLIP_L_TEXT = CLIPTextConfig()
OPENCLIP_BIGG_TEXT = CLIPTextConfig(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    hidden_act="gelu",
    pad_token_id=0,
    projection_dim=1280,
)
CHINESE_CLIP_H_TEXT = RobertaConfig()
CHATGLM3_TEXT = ChatGLMConfig()
CHINESE_CLIP_H_PROJECTED_TEXT = replace(CHINESE_CLIP_H_TEXT, projection_dim=1024)
CHINESE_CLIP_L_TEXT = RobertaConfig(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
)

CLIP_FIXED = {"hidden_act": ("quick_gelu", "gelu"), "num_channels": (3,)}
ROBERTA_FIXED = {"position_embedding_type": ("absolute",), "hidden_act": ("gelu",)}

# The names that ChatGLM's config.json has for what other towers' call otherwise.
_CHATGLM_NAMES = {
    "padded_vocab_size": "vocab_size",
    "ffn_hidden_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
}
CHATGLM_FIXED = {
    "multi_query_attention": (True,),
    "add_qkv_bias": (True,),
    "add_bias_linear": (False,),
    "rmsnorm": (True,),
    "original_rope": (True,),
    "post_layer_norm": (True,),
    "apply_residual_connection_post_layernorm": (False,),
    "pre_seq_len": (None,),
}

_PROJECTED = "CLIPTextModelWithProjection"


def _clip_text_from_json(values: Mapping[str, Any]) -> CLIPTextConfig:
    """transformers writes a projection_dim for every tower: only the architecture tells which has a projection."""
    projected = _PROJECTED in (values.get("architectures") or ())
    values = _text_config(values) if values.get("model_type") == "clip" else values
    check(values, CLIP_FIXED)
    return pick(CLIPTextConfig, values if projected else {**values, "projection_dim": None})


def _clip_text_to_json(config: CLIPTextConfig) -> dict[str, Any]:
    values = plain(config)
    if config.projection_dim is None:
        del values["projection_dim"]
    architecture = "CLIPTextModel" if config.projection_dim is None else _PROJECTED
    return {"architectures": [architecture], "model_type": "clip_text_model", **values}


def _clip_vision_from_json(values: Mapping[str, Any]) -> CLIPVisionConfig:
    check(values, CLIP_FIXED)
    return pick(CLIPVisionConfig, values)


def _clip_vision_to_json(config: CLIPVisionConfig) -> dict[str, Any]:
    return {"architectures": ["CLIPVisionModelWithProjection"], "model_type": "clip_vision_model", **plain(config)}


def _roberta_from_json(values: Mapping[str, Any]) -> RobertaConfig:
    """Of a whole CLIP the tower alone: whether its projection is a part of it is its place's to say."""
    values = {**_text_config(values), "projection_dim": None} if values.get("model_type") == "chinese_clip" else values
    check(values, ROBERTA_FIXED)
    return pick(RobertaConfig, values)


def _roberta_to_json(config: RobertaConfig) -> dict[str, Any]:
    fixed = {"hidden_act": "gelu", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    values = plain(config)
    if config.projection_dim is None:
        del values["projection_dim"]
    return {
        "architectures": ["ChineseCLIPTextModel"],
        "model_type": "chinese_clip_text_model",
        **values,
        **fixed,
    }


def _chatglm_from_json(values: Mapping[str, Any]) -> ChatGLMConfig:
    check(values, CHATGLM_FIXED)
    return pick(ChatGLMConfig, {**values, **{ours: values.get(name) for name, ours in _CHATGLM_NAMES.items()}})


def _chatglm_to_json(config: ChatGLMConfig) -> dict[str, Any]:
    theirs = {ours: name for name, ours in _CHATGLM_NAMES.items()}
    values = {theirs.get(key, key): value for key, value in plain(config).items()}
    fixed = {key: accepted[0] for key, accepted in CHATGLM_FIXED.items()}
    return {"architectures": ["ChatGLMModel"], "model_type": "chatglm", **values, **fixed}


def _states_from_json(values: Mapping[str, Any]) -> TextStatesConfig:
    if missing := [key for key in ("texts", "length", "hidden_size", "vocab_size") if values.get(key) is None]:
        raise ValueError(f"config.json: {missing[0]} is missing")
    return pick(TextStatesConfig, values)


def _states_to_json(config: TextStatesConfig) -> dict[str, Any]:
    return {"model_type": "bdm_text_states", **plain(config)}


def _text_config(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The text tower's part of the config of a whole CLIP."""
    if not isinstance(values.get("text_config"), dict):
        raise ValueError("config.json: a whole CLIP without text_config")
    return values["text_config"]


# How a config.json is read, by its model_type, and how a config is written.
READERS = {
    "clip": _clip_text_from_json,
    "clip_text_model": _clip_text_from_json,
    "clip_vision_model": _clip_vision_from_json,
    "bert": _roberta_from_json,
    "chinese_clip": _roberta_from_json,
    "chinese_clip_text_model": _roberta_from_json,
    "chatglm": _chatglm_from_json,
    "bdm_text_states": _states_from_json,
}
WRITERS = {
    CLIPTextConfig: _clip_text_to_json,
    CLIPVisionConfig: _clip_vision_to_json,
    RobertaConfig: _roberta_to_json,
    ChatGLMConfig: _chatglm_to_json,
    TextStatesConfig: _states_to_json,
}
