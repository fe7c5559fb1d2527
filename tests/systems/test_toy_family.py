"""A system that the library does not know, made of one row: it draws, is saved, loaded, converted and plugged into.

Two text encoders read its prompt, joined one after the other, the first also pooled; its noise schedule is a class of
this file. Nothing of the library is changed for it.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bdm_jax.convert.conversion import to_jax, to_torch
from bridge import noisy
from safetensors.numpy import load_file, save_file

from bdm_jax.diffusion.schedule import Schedule
from bdm_jax.errors import UserError
from bdm_jax.models import functional
from bdm_jax.models.config import CLIPTextConfig, RobertaConfig, UNetConfig, VAEConfig
from bdm_jax.paths import TOKENIZERS
from bdm_jax.plugins.install import with_loras
from bdm_jax.plugins.spec import Spec
from bdm_jax.sampling import passes as module
from bdm_jax.sampling.generate import generate
from bdm_jax.sampling.settings import Request, Sampling
from bdm_jax.systems import families
from bdm_jax.systems.components import Component
from bdm_jax.systems.families import Family, Part
from bdm_jax.systems.pipeline import BridgePipeline
from bdm_jax.text import readers
from bdm_jax.text.tokenizer import Tokenizer
from bdm_jax.text.towers import Reader, Tower

SIZE = (32, 48)


@dataclass(frozen=True)
class AngleSchedule(Schedule):
    """alpha = cos a, sigma = sin a; the network is told the angle a in degrees."""

    steepest: float = 89.0
    prediction_type: str = "epsilon"

    @property
    def span(self):
        return math.tan(math.radians(1)), math.tan(math.radians(self.steepest))

    def levels(self, count, spacing=None, solver=False):
        angles = np.linspace(self.steepest, 1, count)
        return angles, np.tan(np.radians(angles))

    def time(self, k, whole=None):
        return np.degrees(np.arctan(k))

    def alpha_sigma(self, t):
        angle = jnp.radians(jnp.asarray(t, jnp.float32))[:, None, None, None]
        return jnp.cos(angle), jnp.sin(angle)

    def draw(self, key, bias="none"):
        return jax.random.uniform(key, minval=1.0, maxval=self.steepest)

    def to_json(self):
        return {"_class_name": "AngleScheduler", "steepest": self.steepest, "prediction_type": self.prediction_type}

    @classmethod
    def from_json(cls, values):
        return cls(values["steepest"], values["prediction_type"])


TOY = Family(
    "toy",
    "Toy",
    backbone=(
        Part("unet", (UNetConfig,), entry=("diffusers", "UNet2DConditionModel"), lora=("lora_unet_",)),
        Part("vae", (VAEConfig,), entry=("diffusers", "AutoencoderKL")),
        Part("text_encoder", (CLIPTextConfig,), entry=("transformers", "CLIPTextModel")),
        Part("glyph_encoder", (RobertaConfig,), kinds=("branch_text_encoder",), lora=("lora_glyph_",)),
        Part("tokenizer", entry=("transformers", "CLIPTokenizer")),
        Part("glyph_tokenizer"),
    ),
    readers=(
        Reader(
            "backbone",
            (Tower("text_encoder", "tokenizer", pooled=True), Tower("glyph_encoder", "glyph_tokenizer")),
            join="tokens",
        ),
    ),
    pipeline_class="ToyPipeline",
    scheduler_class="AngleScheduler",
    schedule=AngleSchedule,
    sampler="euler",
    guidance=2.0,
)


@pytest.fixture(autouse=True)
def row(monkeypatch):
    monkeypatch.setitem(families.FAMILIES, "toy", TOY)


@pytest.fixture
def toy(seed):
    english, chinese = (Tokenizer.from_pretrained(TOKENIZERS / name) for name in ("english", "chinese"))
    text = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    ids = dict(bos_token_id=english.start, eos_token_id=english.end, pad_token_id=english.pad)
    configs = {
        "unet": UNetConfig(
            block_out_channels=(16, 32),
            transformer_layers=(0, 2),
            layers_per_block=1,
            num_heads=2,
            norm_num_groups=8,
            cross_attention_dim=16,
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=16 + 6 * 8,
            sample_size=4,
        ),
        "vae": VAEConfig(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4, sample_size=32),
        "text_encoder": CLIPTextConfig(**text, **ids, vocab_size=english.vocab_size, max_position_embeddings=16),
        "glyph_encoder": RobertaConfig(**text, vocab_size=chinese.vocab_size, max_position_embeddings=16),
    }
    parts = {name: Component(config, noisy(functional.init(config, seed), seed)) for name, config in configs.items()}
    return BridgePipeline(TOY, {**parts, "tokenizer": english, "glyph_tokenizer": chinese}, guidance=3.0)


@pytest.fixture
def latents(monkeypatch):
    """A function from a system and a request to the latents that the picture is decoded from, (h,w,C)."""

    def draw(pipeline, request, **settings):
        seen = []
        with monkeypatch.context() as patch:
            decode = module.decode
            patch.setattr(module, "decode", lambda vae, x, tile: seen.append(np.asarray(x)) or decode(vae, x, tile))
            (image,) = generate(pipeline, [request], Sampling(steps=4, size=SIZE, **settings))
        assert image.shape == (*SIZE, 3)
        return seen[0][0]

    return draw


def test_draws(toy, latents):
    """Against Euler's rule written out: z = x / alpha, dz = eps dk; 1e-3 as for whole runs elsewhere."""
    request = Request("red 灯", "dull", seed=3)
    reader = toy.readers["backbone"]
    cond = readers.encode(reader, toy.parts, readers.read(reader, toy.parts, ["dull", "red 灯"]))
    assert cond.tokens.shape == (2, 32, 16) and cond.pooled.shape == (2, 16)
    ids = jnp.tile(jnp.array([[*SIZE, 0, 0, *SIZE]], jnp.float32), (2, 1))
    cond = type(cond)(cond.tokens, pooled=cond.pooled, time_ids=ids)
    config, params = toy.unet
    predict = jax.jit(lambda x, t: functional.bind(config, params)(x, t, cond))
    t, k = toy.schedule.levels(4)
    z = jax.random.normal(jax.random.key(3), (SIZE[0] // 8, SIZE[1] // 8, 4)) * math.hypot(1, k[0])
    for row in range(4):
        x = jnp.stack([z, z]) / math.hypot(1, k[row])
        negative, positive = predict(x, jnp.full(2, t[row], jnp.float32))
        z = z + ([*k, 0.0][row + 1] - k[row]) * (negative + 3.0 * (positive - negative))
    found = latents(toy, request)
    difference = np.abs(found - z).max() / np.abs(z).max()
    print(f"relative difference {difference:.2e}")
    assert difference <= 1e-3
    assert np.abs(found - latents(toy, Request("red 灯", "dull", seed=3), guidance=2.0)).max() > 1e-3


def test_saved_loaded_and_converted(toy, latents, tmp_path):
    folder = tmp_path / "model"
    toy.save_pretrained(folder, "float32")
    back = BridgePipeline.from_pretrained(folder)
    assert back.family is TOY and back.schedule == AngleSchedule() and back.guidance == 3.0
    assert list(back.parts) == [part.name for part in TOY.backbone] == list(toy.parts)
    request = Request("red 灯", seed=3)
    drawn = latents(toy, request)
    np.testing.assert_array_equal(latents(back, request), drawn)
    to_jax(folder, tmp_path / "jax")
    to_torch(tmp_path / "jax", tmp_path / "torch")
    to_torch(folder, tmp_path / "diffusers", layout="diffusers")
    for other in ("torch", "diffusers"):
        for name in toy.networks:
            (file,) = (folder / name).glob("*.safetensors")
            before, after = load_file(file), load_file(tmp_path / other / name / file.name)
            assert before.keys() == after.keys()
            for key, array in before.items():
                np.testing.assert_array_equal(array, after[key], err_msg=f"{other} {name} {key}")
        np.testing.assert_array_equal(latents(BridgePipeline.from_pretrained(tmp_path / other), request), drawn)


def test_plug_ins_and_replacements(toy, tmp_path, rng):
    module_name = "encoder.layer.0.attention.self.query"
    up, down = rng.standard_normal((16, 2), np.float32), rng.standard_normal((2, 16), np.float32)
    key = f"lora_glyph_{module_name.replace('.', '_')}"
    save_file({f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}, tmp_path / "a.safetensors")
    changed = with_loras(toy, [Spec(tmp_path / "a.safetensors", 1.0, 1.0)])
    expected = np.asarray(toy.glyph_encoder.params[f"{module_name}.kernel"]) + (up @ down).T
    np.testing.assert_allclose(changed.glyph_encoder.params[f"{module_name}.kernel"], expected, rtol=1e-5, atol=1e-6)
    toy.save_pretrained(tmp_path / "model", "float32")
    changed.save_pretrained(tmp_path / "other", "float32")
    mixed = BridgePipeline.from_pretrained(tmp_path / "model", glyph_encoder=tmp_path / "other/glyph_encoder")
    np.testing.assert_array_equal(
        mixed.glyph_encoder.params[f"{module_name}.kernel"],
        changed.glyph_encoder.params[f"{module_name}.kernel"],
    )


def test_what_does_not_fit_is_named(toy, tmp_path):
    with pytest.raises(UserError, match="a system of the family Toy lacks: glyph_tokenizer"):
        toy.replace(glyph_tokenizer=None)
    with pytest.raises(UserError, match="unknown part of a system of the family Toy 'branch'|'branch'"):
        toy.replace(branch=toy.unet)
    with pytest.raises(UserError, match="glyph_encoder: CLIPTextConfig in place of RobertaConfig"):
        toy.replace(glyph_encoder=toy.text_encoder)
    assert toy.branch is None and toy.text_encoder_2 is None
    toy.save_pretrained(tmp_path, "float32")
    (tmp_path / "glyph_tokenizer").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="not a whole model folder; missing: glyph_tokenizer"):
        BridgePipeline.from_pretrained(tmp_path)
