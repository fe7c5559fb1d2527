"""A small Kolors as diffusers makes it, with a SentencePiece model of its own."""

import io
from functools import lru_cache
from pathlib import Path

import diffusers
import sentencepiece
import torch
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer
from torch_parts import fill, tiny_vae

LENGTH = 256  # tokens of a prompt, padded
WIDTH = 32  # of the text's states

_TEXTS = ("一只可爱的猫", "红灯笼在屋檐下", "a red lantern under a roof", "水墨山水", "a photo of a cat", "春夏秋冬")


@lru_cache
def pieces(byte_fallback: bool = True) -> bytes:
    """The bytes of a tokenizer.model: pieces of a few words and, as ChatGLM's, of every byte."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_TEXTS * 20),
        model_writer=model,
        vocab_size=320,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=byte_fallback,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def tiny(folder: Path, seed: int) -> diffusers.KolorsPipeline:
    """A whole Kolors of random weights; `folder` gets its tokenizer.model."""
    generator = torch.Generator().manual_seed(seed)
    (folder / "tokenizer.model").write_bytes(pieces())
    tokenizer = ChatGLMTokenizer(str(folder / "tokenizer.model"))
    text = ChatGLMConfig(
        num_layers=3,
        padded_vocab_size=352,
        hidden_size=WIDTH,
        ffn_hidden_size=48,
        kv_channels=16,
        num_attention_heads=4,
        multi_query_group_num=2,
        seq_length=LENGTH,
        layernorm_epsilon=1e-5,
        **dict.fromkeys(("multi_query_attention", "add_qkv_bias", "rmsnorm", "original_rope", "post_layer_norm"), True),
        apply_residual_connection_post_layernorm=False,
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        norm_num_groups=8,
        cross_attention_dim=24,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTH + 6 * 8,
        encoder_hid_dim=WIDTH,
        encoder_hid_dim_type="text_proj",
    )
    scheduler = diffusers.EulerDiscreteScheduler(
        num_train_timesteps=1100,
        beta_start=0.00085,
        beta_end=0.014,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
    )
    encoder = ChatGLMModel(text, empty_init=False)
    vae = tiny_vae()
    for network in (unet, vae, encoder):
        fill(network, generator)
    return diffusers.KolorsPipeline(vae, encoder, tokenizer, unet, scheduler)


def controlnet(unet: diffusers.UNet2DConditionModel, seed: int) -> diffusers.ControlNetModel:
    """A ControlNet with a text projection of its own, as Kolors' are, random also where it starts at zero."""
    network = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8, 8, 16))
    fill(network, torch.Generator().manual_seed(seed))
    return network
