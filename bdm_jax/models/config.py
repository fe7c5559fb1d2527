"""Sizes of the networks: frozen dataclasses whose fields carry the names of diffusers' and transformers' config.json.

`to_json` writes what `from_pretrained` of those libraries reads; `from_json` reads what they write and refuses, by
name, a value that these networks do not implement.
"""

from typing import Any

from bdm_jax.models.autoencoders import config as autoencoders
from bdm_jax.models.autoencoders.config import SD15_VAE, SDXL_VAE, TAESD, TinyVAEConfig, VAEConfig
from bdm_jax.models.towers import config as towers
from bdm_jax.models.towers.config import (
    CHATGLM3_TEXT,
    CHINESE_CLIP_H_PROJECTED_TEXT,
    CHINESE_CLIP_H_TEXT,
    CHINESE_CLIP_L_TEXT,
    CLIP_L_TEXT,
    OPENCLIP_BIGG_TEXT,
    ChatGLMConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    RobertaConfig,
    TextStatesConfig,
)
from bdm_jax.models.unet import config as unet
from bdm_jax.models.unet.config import (
    BDM_BRANCH,
    BDM_SDXL_BRANCH,
    KOLORS_UNET,
    SD15_CONTROLNET,
    SD15_UNET,
    SDXL_UNET,
    BranchConfig,
    ControlNetConfig,
    EncoderConfig,
    ImageProjectionConfig,
    ResamplerConfig,
    T2IAdapterConfig,
    UNetConfig,
    branch_config,
)

__all__ = [
    "BDM_BRANCH",
    "BDM_SDXL_BRANCH",
    "CHATGLM3_TEXT",
    "CHINESE_CLIP_H_PROJECTED_TEXT",
    "CHINESE_CLIP_H_TEXT",
    "CHINESE_CLIP_L_TEXT",
    "CLIP_L_TEXT",
    "KOLORS_UNET",
    "OPENCLIP_BIGG_TEXT",
    "SD15_CONTROLNET",
    "SD15_UNET",
    "SD15_VAE",
    "SDXL_UNET",
    "SDXL_VAE",
    "TAESD",
    "BranchConfig",
    "CLIPTextConfig",
    "CLIPVisionConfig",
    "ChatGLMConfig",
    "Config",
    "ControlNetConfig",
    "EncoderConfig",
    "ImageProjectionConfig",
    "ResamplerConfig",
    "RobertaConfig",
    "T2IAdapterConfig",
    "TextStatesConfig",
    "TinyVAEConfig",
    "UNetConfig",
    "VAEConfig",
    "branch_config",
    "from_json",
    "to_json",
]

_System = UNetConfig | BranchConfig | ControlNetConfig | VAEConfig | TinyVAEConfig | CLIPTextConfig | RobertaConfig
Config = _System | ChatGLMConfig | TextStatesConfig | T2IAdapterConfig | CLIPVisionConfig

_READERS = {**unet.READERS, **towers.READERS, **autoencoders.READERS}
_WRITERS = {**unet.WRITERS, **towers.WRITERS, **autoencoders.WRITERS}


def to_json(config: Config) -> dict[str, Any]:
    """The config.json of diffusers or transformers for this config."""
    return _WRITERS[type(config)](config)


def from_json(values: dict[str, Any]) -> Config:
    """The config that a config.json describes.

    Raises:
        ValueError: an unknown class, a value that is not valid, or a setting that these networks do not implement
            (named).
    """
    name = values.get("_class_name") or values.get("model_type")
    if not isinstance(name, str) or name not in _READERS:
        raise ValueError(f"config.json: {name!r} is not a network this library has")
    return _READERS[name](values)
