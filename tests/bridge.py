"""A whole bridge, tiny and random, in memory and as a folder."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.models.chinese_clip.modeling_chinese_clip import ChineseCLIPTextModel

from bdm_jax.diffusion.schedule import DiscreteSchedule
from bdm_jax.latents.autoencoder import decode
from bdm_jax.models import functional
from bdm_jax.models.config import BranchConfig, CLIPTextConfig, RobertaConfig, UNetConfig, VAEConfig
from bdm_jax.paths import TOKENIZERS
from bdm_jax.sampling import passes as module
from bdm_jax.sampling.generate import generate
from bdm_jax.sampling.settings import Request, Sampling
from bdm_jax.systems.components import Component
from bdm_jax.systems.families import FAMILIES
from bdm_jax.systems.pipeline import BridgePipeline
from bdm_jax.text.encode import tokenize
from bdm_jax.text.tokenizer import Tokenizer

SIZE = (32, 48)
REQUEST = Request("红灯笼", "低质量", "film grain", "blurry", seed=5)
SCHEDULER = {"timestep_spacing": "linspace", "algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"}


@pytest.fixture(scope="session")
def tiny(request):
    """A bridge of tiny networks, all of whose parameters are random (also those that start at zero)."""
    english, chinese = (Tokenizer.from_pretrained(TOKENIZERS / name) for name in ("english", "chinese"))
    encoder = dict(block_out_channels=(16, 32), transformer_layers=(1, 0), num_heads=2, norm_num_groups=8)
    text = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    ids = dict(bos_token_id=english.start, eos_token_id=english.end, pad_token_id=english.pad)
    configs = {
        "unet": UNetConfig(**encoder, layers_per_block=1, cross_attention_dim=16, sample_size=4),
        "vae": VAEConfig(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4, sample_size=32),
        "text_encoder": CLIPTextConfig(**text, **ids, vocab_size=english.vocab_size, max_position_embeddings=16),
        "branch": BranchConfig(**encoder, layers_per_block=1, cross_attention_dim=16),
        "branch_text_encoder": RobertaConfig(**text, vocab_size=chinese.vocab_size, max_position_embeddings=16),
    }
    seed = request.config.option.seed
    parts = {name: Component(config, noisy(functional.init(config, seed), seed)) for name, config in configs.items()}
    schedule = DiscreteSchedule(prediction_type="v_prediction")
    parts |= {"tokenizer": english, "branch_tokenizer": chinese}
    return BridgePipeline(FAMILIES["sd15"], parts, schedule, guidance=3.0)


@pytest.fixture(scope="session")
def tiny_folder(tiny, tmp_path_factory):
    """The tiny bridge saved in fp32."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny.save_pretrained(folder, "float32")
    return folder


@pytest.fixture(scope="session")
def load_chinese_tower():
    """A function from a branch_text_encoder folder to transformers' module with exactly the folder's weights.

    from_pretrained of transformers 5.23 sets the padding token's embedding to zero, whatever the file holds.
    """

    def load(folder):
        module = ChineseCLIPTextModel.from_pretrained(folder, add_pooling_layer=False)
        state = load_file(folder / "model.safetensors")
        module.load_state_dict({key: value for key, value in state.items() if not key.startswith("text_projection")})
        return module.eval()

    return load


@pytest.fixture(scope="session")
def torch_nets(tiny_folder, load_chinese_tower):
    """The tiny bridge's networks as the libraries' own modules; the branch is a ControlNet whose hint network is 0."""
    load = {
        "unet": diffusers.UNet2DConditionModel,
        "vae": diffusers.AutoencoderKL,
        "text_encoder": transformers.CLIPTextModel,
    }
    nets = {name: cls.from_pretrained(tiny_folder / name).eval() for name, cls in load.items()}
    nets["branch"] = diffusers.ControlNetModel.from_pretrained(tiny_folder / "branch", low_cpu_mem_usage=False).eval()
    nets["branch_text_encoder"] = load_chinese_tower(tiny_folder / "branch_text_encoder")
    for parameter in nets["branch"].controlnet_cond_embedding.parameters():
        parameter.zero_()
    return nets


@pytest.fixture
def latents(tiny, monkeypatch):
    """A function from requests and settings to the latents that the pictures are decoded from, (B,C,h,w)."""
    seen = []
    monkeypatch.setattr(module, "decode", lambda vae, x, tile: seen.append(np.asarray(x)) or decode(vae, x, tile))

    def draw(requests, pipeline=tiny, batch_size=8, controls=(), **settings):
        seen.clear()
        settings = Sampling(**{"steps": 6, "size": SIZE, **settings})
        list(generate(pipeline, requests, settings, batch_size=batch_size, controls=controls))
        return np.moveaxis(np.concatenate(seen), -1, 1)

    return draw


@pytest.fixture
def plain(tiny, tiny_folder, torch_nets):
    """BDM's loop in PyTorch: what is scaled, gated and guided is given as functions of the row."""

    def states(tower, tokenizer, texts, **more):
        ids = torch.from_numpy(tokenize(tokenizer, texts)[:, 0].astype(np.int64))
        return torch_nets[tower](ids, **more)

    def english_states(request, more=()):
        """Of the negative and the positive prompt, and of more (2+N,S,D)."""
        texts = [request.english_negative, request.english, *more]
        return states("text_encoder", tiny.tokenizer, texts).last_hidden_state

    def draw(
        request=None,
        steps=6,
        cls=diffusers.DPMSolverMultistepScheduler,
        scale=lambda i: 1.0,
        guide=lambda i, predict: classifier_free(predict, 3.0),
        guess=False,
        english=None,
        noise=None,
        clean=None,
        begin=0,
        controls=(),
        unet=None,
        adapt=lambda i, english_text: {},
        after=lambda x, i, scheduler: x,
        more=((), ()),
        **config,
    ):
        """`more`: texts beside the request's own, English and Chinese, from number 2 on."""
        request = REQUEST if request is None else request
        scheduler = cls.from_pretrained(tiny_folder / "scheduler", **{**SCHEDULER, **config})
        scheduler.set_timesteps(steps)
        if english is None:
            english = english_states(request, more[0])
        chinese = states("branch_text_encoder", tiny.branch_tokenizer, [request.negative, request.prompt, *more[1]])
        chinese = chinese.last_hidden_state
        noise = unit_noise(request.seed) if noise is None else noise
        x, timesteps = noise, scheduler.timesteps[begin:]
        if clean is not None:
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(begin)
            x = scheduler.add_noise(clean, noise, timesteps[:1])
        for i, t in enumerate(timesteps):

            def predict(english_text, chinese_text, x=x, t=t, i=i):
                """The prediction for one text of each language, 0 the negative and 1 the positive."""
                down, mid = torch_nets["branch"](
                    x, t, chinese[[chinese_text]], torch.zeros(1, 3, *SIZE), guess_mode=guess, return_dict=False
                )
                scales = np.broadcast_to(scale(i), 5) * (0.0 if guess and not chinese_text else 1.0)
                residuals = [float(s) * r for s, r in zip(scales, [*down, mid], strict=True)]
                for network, hint, strength in controls:
                    down, mid = network(x, t, english[[english_text]], hint, strength(i), return_dict=False)
                    residuals = [one + other for one, other in zip(residuals, [*down, mid], strict=True)]
                more = {"down_block_additional_residuals": residuals[:-1]}
                more["mid_block_additional_residual"] = residuals[-1]
                more |= adapt(i, english_text)
                return (unet or torch_nets["unet"])(x, t, english[[english_text]], **more).sample

            x = after(scheduler.step(guide(i, predict), t, x).prev_sample, i, scheduler)
        return x.numpy()

    draw.noise, draw.english = unit_noise, english_states
    draw.classifier_free, draw.remembering = classifier_free, remembering
    return draw


@pytest.fixture
def kept(torch_nets, monkeypatch):
    """Makes the branch of the plain loop answer with its residuals of the last key row."""
    return lambda is_key: monkeypatch.setitem(torch_nets, "branch", remembering(torch_nets["branch"], is_key))


@pytest.fixture
def deep_cached(torch_nets, kept):
    """The plain loop's UNet, whose last block takes the features of the last key row; everything else is computed."""
    unet, handles = torch_nets["unet"], []

    def cached(is_key):
        kept(is_key)
        recall = remembering(lambda features: features, is_key)

        def before(module, given, named):
            return given, {**named, "hidden_states": recall(named["hidden_states"])}

        handles.append(unet.up_blocks[-1].register_forward_pre_hook(before, with_kwargs=True))
        return unet

    yield cached
    for handle in handles:
        handle.remove()


def remembering(function, is_key):
    """Answers of `function`, asked for the negative and then the positive text of each row: those of the key rows."""
    memory, asked = [], []

    def answer(*arguments, **options):
        row, text = divmod(len(asked), 2)
        asked.append(None)
        if is_key(row):
            memory[text:] = [function(*arguments, **options)]
        return memory[text]

    return answer


def classifier_free(predict, scale):
    """Of predictions by the numbers of their texts, (English, Chinese)."""
    negative, positive = predict(0, 0), predict(1, 1)
    return negative + scale * (positive - negative)


def unit_noise(seed, size=SIZE):
    """The noise of a seed, (1,C,h,w)."""
    noise = np.asarray(jax.random.normal(jax.random.key(seed), (size[0] // 8, size[1] // 8, 4)))
    return torch.from_numpy(np.moveaxis(noise, -1, 0).copy())[None]


def noisy(params, seed):
    """Every parameter with noise added, zero convolutions included; on the host, where no shape is compiled."""
    rng = np.random.default_rng(seed)
    noise = {path: 0.1 * rng.standard_normal(value.shape, np.float32) for path, value in sorted(params.items())}
    return {path: jnp.asarray(np.asarray(value) + noise[path]) for path, value in params.items()}
