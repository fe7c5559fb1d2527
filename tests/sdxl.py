"""A tiny random SDXL as diffusers makes it, and a branch for it: 360's network of BDM-SDXL in PyTorch, and ours."""

from dataclasses import replace

import diffusers
import pytest
import torch
import transformers
from bridge import noisy
from safetensors.torch import load_file
from torch_parts import fill, tiny_vae

from bdm_jax.models import functional
from bdm_jax.models.config import BranchConfig, RobertaConfig, branch_config, to_json
from bdm_jax.models.unet.config import EncoderConfig
from bdm_jax.paths import TOKENIZERS
from bdm_jax.systems.components import Component
from bdm_jax.systems.pipeline import BridgePipeline
from bdm_jax.text.tokenizer import Tokenizer

WIDTHS = (16, 32)  # of the two English text encoders
CHINESE = (12, 20)  # of the two Chinese ones
JOINT = 14  # of the second one's projection


@pytest.fixture(scope="session")
def sdxl(request):
    """A tiny random SDXL as diffusers makes it, its tokenizers real."""
    generator = torch.Generator().manual_seed(request.config.option.seed)
    tokenizers = [transformers.CLIPTokenizer.from_pretrained(TOKENIZERS / "english") for _ in WIDTHS]
    tokenizers[1].pad_token = "!"
    text = dict(num_hidden_layers=3, num_attention_heads=2, vocab_size=len(tokenizers[0]), max_position_embeddings=16)
    ids = dict(bos_token_id=tokenizers[0].bos_token_id, eos_token_id=tokenizers[0].eos_token_id)
    first = transformers.CLIPTextConfig(hidden_size=16, intermediate_size=32, hidden_act="quick_gelu", **text, **ids)
    second = transformers.CLIPTextConfig(
        hidden_size=32, intermediate_size=48, hidden_act="gelu", projection_dim=24, **text, **ids
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=1,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        norm_num_groups=8,
        cross_attention_dim=sum(WIDTHS),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8,
    )
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    encoders = transformers.CLIPTextModel(first), transformers.CLIPTextModelWithProjection(second)
    vae = tiny_vae()
    for network in (unet, vae, *encoders):
        fill(network, generator)
    return diffusers.StableDiffusionXLPipeline(
        vae, encoders[0], encoders[1], tokenizers[0], tokenizers[1], unet, scheduler
    )


@pytest.fixture(scope="session")
def sdxl_folder(sdxl, tmp_path_factory):
    """As diffusers saves it."""
    folder = tmp_path_factory.mktemp("sdxl")
    sdxl.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sdxl_bridge(sdxl_folder, request):
    """The tiny SDXL with a branch and its two text encoders, all of whose parameters are random."""
    backbone, chinese = BridgePipeline.from_pretrained(sdxl_folder), Tokenizer.from_pretrained(TOKENIZERS / "chinese")
    text = dict(vocab_size=chinese.vocab_size, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2)
    first, second = (RobertaConfig(hidden_size=width, max_position_embeddings=16, **text) for width in CHINESE)
    configs = {
        "branch": branch_config(backbone.unet.config, sum(CHINESE), JOINT),
        "branch_text_encoder": first,
        "branch_text_encoder_2": replace(second, projection_dim=JOINT),
    }
    seed = request.config.option.seed
    parts = {name: Component(config, noisy(functional.init(config, seed), seed)) for name, config in configs.items()}
    return backbone.replace(**parts, branch_tokenizer=chinese, guidance=3.0)


@pytest.fixture(scope="session")
def sdxl_bridge_folder(sdxl_bridge, tmp_path_factory):
    """Saved in fp32."""
    folder = tmp_path_factory.mktemp("sdxl-bridge")
    sdxl_bridge.save_pretrained(folder, "float32")
    return folder


class ControlNetBDM(diffusers.ControlNetModel):
    """360's network of the SDXL variant (specs/bdm.md, part 5): an SDXL ControlNet without its hint network, behind two
    layers without bias that take states and pooled text to the backbone's widths.
    """

    @classmethod
    def of(cls, config: BranchConfig) -> "ControlNetBDM":
        """Of these sizes, from our config.json."""
        network = cls.from_config({key: value for key, value in to_json(config).items() if "_embeds_" not in key})
        network.controlnet_cond_embedding = _NoHint()
        states, pooled = config.prompt_embeds_dim, config.pooled_prompt_embeds_dim
        network.prompt_embeds_projection = torch.nn.Linear(states, config.cross_attention_dim, bias=False)
        width = EncoderConfig.pooled_dim.fget(config)
        network.pooled_prompt_embeds_projection = torch.nn.Linear(pooled, width, bias=False)
        return network.eval()

    @classmethod
    def in_folder(cls, folder, config: BranchConfig) -> "ControlNetBDM":
        """With the weights of a component folder: exactly those."""
        network = cls.of(config)
        network.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
        return network

    def forward(self, x, t, states, pooled, time_ids):
        """Noisy latents, timesteps, Chinese states and pooled text, sizes -> the UNet's keywords."""
        added = {"text_embeds": self.pooled_prompt_embeds_projection(pooled), "time_ids": time_ids}
        states = self.prompt_embeds_projection(states)
        down, mid = super().forward(x, t, states, x, added_cond_kwargs=added, return_dict=False)
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}


class _NoHint(torch.nn.Module):
    def forward(self, hint):
        return torch.zeros(())


class ChineseTexts(torch.nn.Module):
    """Both text encoders of a branch in a pipeline folder, by transformers: ids (B,S) -> states joined on width, and
    the second's state of [CLS] through its projection.
    """

    def __init__(self, folder, load_chinese_tower):
        super().__init__()
        second = load_file(folder / "branch_text_encoder_2" / "model.safetensors")
        self.first = load_chinese_tower(folder / "branch_text_encoder")
        self.second = load_chinese_tower(folder / "branch_text_encoder_2")
        self.projection = second["text_projection.weight"]

    def forward(self, ids):
        first, second = (tower(ids).last_hidden_state for tower in (self.first, self.second))
        return torch.cat([first, second], dim=-1), second[:, 0] @ self.projection.T
