"""Embeddings in a prompt, against diffusers and transformers; and what is refused."""

from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from diffusers.loaders import TextualInversionLoaderMixin
from safetensors.torch import save_file
from transformers.models.chinese_clip.modeling_chinese_clip import ChineseCLIPTextModel

from bdm_jax.errors import UserError
from bdm_jax.models import functional
from bdm_jax.models.config import CLIPTextConfig, RobertaConfig, UNetConfig
from bdm_jax.paths import TOKENIZERS
from bdm_jax.plugins.inversion import Embedding, add_embeddings, for_encoders, load_embeddings, token_table
from bdm_jax.systems.components import Component
from bdm_jax.text.encode import encode, read
from bdm_jax.text.tokenizer import Tokenizer

SHARED = Path(__file__).parents[3] / "shared" / "data"
WIDTH = 32
SIZES = dict(hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
STATES = 1e-5  # the same sums in fp32 in another order


@pytest.fixture(scope="module")
def english():
    return Tokenizer.from_pretrained(TOKENIZERS / "clip")


@pytest.fixture(scope="module")
def chinese():
    return Tokenizer.from_pretrained(TOKENIZERS / "chinese", 52)


@pytest.fixture
def clip(english, randomised, torch_params):
    """torch's tower and ours."""
    ids = dict(bos_token_id=english.start, eos_token_id=english.end, pad_token_id=english.pad)
    sizes = dict(SIZES, vocab_size=english.vocab_size, max_position_embeddings=77, **ids)
    module = randomised(transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes)))
    config = CLIPTextConfig(**sizes)
    return module, Component(config, torch_params(module, config, prefix="text_model."))


@pytest.fixture
def bert(chinese, randomised, torch_params):
    sizes = dict(SIZES, vocab_size=chinese.vocab_size, max_position_embeddings=52)
    module = randomised(ChineseCLIPTextModel(transformers.ChineseCLIPTextConfig(**sizes), add_pooling_layer=False))
    config = RobertaConfig(**sizes, type_vocab_size=2)
    return module, Component(config, torch_params(module, config))


@pytest.fixture
def made(rng):
    """A function: token, number of vectors -> an embedding as large as the towers' own words."""
    return lambda token, count: Embedding(token, rng.standard_normal((count, WIDTH), np.float32) / WIDTH**0.5)


class Diffusers(TextualInversionLoaderMixin):
    """diffusers' loader with a tokenizer and a tower of its own."""

    hf_device_map = None
    components: dict = {}

    def __init__(self, tower):
        self.tokenizer = transformers.CLIPTokenizer.from_pretrained(TOKENIZERS / "clip")
        self.text_encoder = tower

    def states(self, prompts):
        prompts = self.maybe_convert_prompt(prompts, self.tokenizer)
        ids = self.tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt").input_ids
        return self.text_encoder(ids).last_hidden_state.numpy()


SINGLE, MULTI, PLAIN = ("<birb>", 1), ("<cat-toy>", 4), ("easynegativ", 3)


@pytest.mark.parametrize("chosen", [[SINGLE], [MULTI], [PLAIN], [SINGLE, MULTI, PLAIN]])
def test_the_states_are_those_of_diffusers(chosen, english, clip, made, assert_parity):
    module, component = clip
    theirs, embeddings = Diffusers(module), [made(*one) for one in chosen]
    theirs.load_textual_inversion(
        [{token: torch.from_numpy(vectors.copy())} for token, vectors, _ in embeddings],
        token=[e.token for e in embeddings],
    )
    tokens = " and ".join(embedding.token for embedding in embeddings)
    prompts = [f"a photo of {tokens}, oil on canvas", tokens, f"{embeddings[0].token}, a dog.", "a dog", ""]
    tokenizer, larger = add_embeddings(english, component, embeddings)
    assert_parity(encode(tokenizer, *larger, prompts).tokens, theirs.states(prompts), STATES)


def test_case_as_in_diffusers(english, clip, made, assert_parity):
    """There too a token is found in any case; but one of several vectors then gives its first alone, and here all."""
    module, component = clip
    theirs, embedding = Diffusers(module), made(*SINGLE)
    theirs.load_textual_inversion({"<birb>": torch.from_numpy(embedding.vectors.copy())})
    tokenizer, larger = add_embeddings(english, component, [embedding])
    prompts = ["a <BIRB>s <Birb>", "A<birb>"]
    assert_parity(encode(tokenizer, *larger, prompts).tokens, theirs.states(prompts), STATES)


@pytest.mark.parametrize("weighted", ["a dog and <birb>", "（<birb>:1.4）[<cat-toy>]", "dog " * 74 + "<cat-toy>"])
def test_windows_and_weights_go_by_vectors(weighted, english, clip, made):
    """The tokens take the place of ordinary words of as many tokens."""
    embeddings = [made(*SINGLE), made(*MULTI)]
    tokenizer, _ = add_embeddings(english, clip[1], embeddings)
    (found,) = tokenizer.content(["cat horse dog tree house"])
    words = {"<birb>": "cat", "<cat-toy>": "horse dog tree house"}
    plain = weighted
    for token, word in words.items():
        plain = plain.replace(token, word)
    tokens, expected = read(tokenizer, [weighted]), read(english, [plain])
    names = dict(zip(range(english.vocab_size, tokenizer.vocab_size), found, strict=True))
    ordinary = np.vectorize(lambda id_: names.get(id_, id_))(tokens.ids)
    np.testing.assert_array_equal(ordinary, expected.ids)
    np.testing.assert_array_equal(tokens.weights, expected.weights)
    assert tokens.ids.max() >= english.vocab_size


def test_an_embedding_that_repeats_a_word_is_that_word(english, clip, chinese, bert):
    for tokenizer, (_, component), path, word in (
        (english, clip, "text_model.embeddings.token_embedding.embedding", "cat"),
        (chinese, bert, "embeddings.word_embeddings.embedding", "猫"),
    ):
        table = np.asarray(component.params[path])
        vectors = (
            table[tokenizer.content([f"{word}{word}"])[0]] if word == "猫" else table[tokenizer.content(["cat cat"])[0]]
        )
        new, larger = add_embeddings(tokenizer, component, [Embedding("<new>", vectors)])
        twice = f"(红 {word} {word}:1.2), {word}"
        np.testing.assert_array_equal(
            encode(new, *larger, ["(红 <new>:1.2), " + word]).tokens, encode(tokenizer, *component, [twice]).tokens
        )


def test_the_chinese_tower_against_transformers(chinese, bert, made, assert_parity):
    module, component = bert
    embeddings = [made("梵高风", 2), made("<birb>", 1)]
    tokenizer, larger = add_embeddings(chinese, component, embeddings)
    prompt = "一只梵高风的猫，<birb>"
    states = encode(tokenizer, *larger, [prompt]).tokens
    one, two, three = (chinese.content([text])[0] for text in ("一只", "的猫，", ""))
    module.resize_token_embeddings(chinese.vocab_size + 3)
    rows = np.concatenate([embedding.vectors for embedding in embeddings])
    module.get_input_embeddings().weight[chinese.vocab_size :] = torch.from_numpy(rows)
    a, b, c = range(chinese.vocab_size, chinese.vocab_size + 3)
    ids = [chinese.start, *one, a, b, *two, c, *three, chinese.end]
    ids += [chinese.pad] * (52 - len(ids))
    assert_parity(states, module(torch.tensor([ids])).last_hidden_state.numpy(), STATES)


def test_without_embeddings_everything_is_the_same(english, clip):
    tokenizer, component = add_embeddings(english, clip[1], [])
    assert tokenizer is english and component is clip[1]


def test_prompts_without_the_token_and_unloading_are_exact(english, clip, chinese, bert, made):
    for tokenizer, (_, component), texts in (
        (english, clip, ["a (red:1.2) lantern", "", "dog " * 80]),
        (chinese, bert, ["红（灯笼：1.2）", "", "猫" * 60]),
    ):
        before = encode(tokenizer, *component, texts).tokens
        new, larger = add_embeddings(tokenizer, component, [made("<cat-toy>", 4)])
        np.testing.assert_array_equal(encode(new, *larger, texts).tokens, before)
        np.testing.assert_array_equal(encode(tokenizer, *component, texts).tokens, before)
        assert tokenizer.added == {}


def test_the_order_of_loading_does_not_matter(english, clip, made):
    component, prompts = clip[1], ["<birb>, easynegativ and (<cat-toy>:1.3)"]
    embeddings = [made(*SINGLE), made(*MULTI), made(*PLAIN)]
    states = encode(*_flat(*add_embeddings(english, component, embeddings)), prompts).tokens
    turned = encode(*_flat(*add_embeddings(english, component, embeddings[::-1])), prompts).tokens
    one_by_one = english, component
    for embedding in embeddings[1:] + embeddings[:1]:
        one_by_one = add_embeddings(*one_by_one, [embedding])
    np.testing.assert_allclose(turned, states, rtol=0, atol=1e-6)
    np.testing.assert_allclose(encode(*_flat(*one_by_one), prompts).tokens, states, rtol=0, atol=1e-6)


def test_a_table_may_have_more_rows_than_there_are_words(english, clip, made):
    config, params = clip[1]
    path, rest = "text_model.embeddings.token_embedding.embedding", 8
    padded = Component(
        replace(config, vocab_size=config.vocab_size + rest),
        {**params, path: np.pad(params[path], ((0, rest), (0, 0)))},
    )
    embedding = made(*SINGLE)
    tokenizer, larger = add_embeddings(english, padded, [embedding])
    assert tokenizer.content(["<birb>"]) == [[config.vocab_size + rest]]
    plain = encode(*_flat(*add_embeddings(english, clip[1], [embedding])), ["a <birb>"]).tokens
    np.testing.assert_array_equal(encode(tokenizer, *larger, ["a <birb>"]).tokens, plain)


def test_names_of_files(tmp_path):
    vectors = torch.ones(2, WIDTH)
    torch.save({"<birb>": vectors}, tmp_path / "file.bin")
    save_file({"emb_params": vectors}, tmp_path / "EasyStyle.safetensors")
    torch.save({"string_to_param": {"*": vectors}, "name": "birb-100"}, tmp_path / "birb.pt")
    for file, token in (("file.bin", "<birb>"), ("EasyStyle.safetensors", "EasyStyle"), ("birb.pt", "birb-100")):
        (found,) = load_embeddings(tmp_path / file)
        assert found.token == token and found.vectors.shape == (2, WIDTH)
        assert {found.token, *found.aliases} == {token, Path(file).stem}
        (found,) = load_embeddings(tmp_path / file, "mine")
        assert found.token == "mine" and found.aliases == ()
    torch.save({"<birb>": vectors}, tmp_path / "learned_embeds-steps-500.bin")  # no name: diffusers calls all so
    assert load_embeddings(tmp_path / "learned_embeds-steps-500.bin")[0].aliases == ()


FILES = {  # by the file's name: what is in it, the prompts that have its vectors, prompts that do not
    "inkstyle.pt": ({"name": "21inkstyle"}, ["inkstyle", "21InkStyle", "embedding:inkstyle"], ["inkstyles"]),
    "InkStyle.pt": ({}, ["inkstyle", "INKSTYLE, wash", "embedding:inkstyle.pt"], ["ink style"]),
    "ink style.v2.pt": ({"name": None}, ["ink style.v2", "Ink  Style.V2"], ["ink", "style.v2"]),
    "水墨.pt": ({"name": "birb"}, ["水墨", "一张水墨画", "birb"], ["水", "墨"]),
    "style.pt": ({"name": "21style"}, ["21style", "embedding:style"], ["style", "a style"]),  # a word stays a word
    "21style.pt": ({"name": "style"}, ["21style", "embedding:style"], ["style"]),
}


@pytest.mark.parametrize("file", FILES)
def test_the_files_name_is_a_token(file, english, clip, rng, tmp_path):
    """As in AUTOMATIC1111's interface and ComfyUI, whatever the file says that it is called."""
    values, with_it, without = FILES[file]
    vectors = torch.from_numpy(rng.standard_normal((2, WIDTH), np.float32))
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, **values}, tmp_path / file)
    tokenizer, larger = add_embeddings(english, clip[1], load_embeddings(tmp_path / file))
    rows = larger.params[token_table(*larger)]
    ids = [len(rows) - 2, len(rows) - 1]
    np.testing.assert_array_equal(rows[-2:], vectors.numpy())
    for prompt in with_it:
        (found,) = tokenizer.content([prompt])
        assert [id_ for id_ in found if id_ in ids] == ids, prompt
    assert tokenizer.content(without) == english.content(without)


def test_a_token_of_ldms_own_and_names_of_two_files(english, clip, tmp_path):
    for file, key in (("ink.pt", "<one>"), ("two/ink.pt", "<two>"), ("three.pt", "*")):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        values = {"string_to_token": {key: 265}, "string_to_param": {key: torch.ones(1, WIDTH)}}
        torch.save(values | ({"name": "INK"} if key == "*" else {}), tmp_path / file)
    one, two, three = (load_embeddings(tmp_path / file)[0] for file in ("ink.pt", "two/ink.pt", "three.pt"))
    assert one.token == "<one>" and one.aliases == ("ink",)
    for pair in ((one, two), (three, one), (one, Embedding("ink", np.ones((1, WIDTH))))):
        with pytest.raises(UserError, match="token ink: two emb.* give one another: FILE=TOKEN|token INK: two"):
            add_embeddings(english, clip[1], pair)
    tokenizer, _ = add_embeddings(english, clip[1], [one, *load_embeddings(tmp_path / "two/ink.pt", "my-ink")])
    assert {name: len(ids) for name, ids in tokenizer.added.items()} == {"<one>": 1, "embedding:ink": 1, "my-ink": 1}


def test_the_real_file(english, clip):
    file = SHARED / "textual-inversion" / "fastai-diffusion-nbs.learned_embeds.bin"
    if not file.is_file():
        pytest.skip(f"{file} is not here")
    (found,) = load_embeddings(file)
    assert found.token == "<birb-style>" and found.vectors.shape == (1, 768)
    with pytest.raises(UserError, match="<birb-style> or fastai-diffusion-nbs.learned_embeds: vectors of width 768"):
        add_embeddings(english, clip[1], [found])


def test_vectors_take_the_type_of_the_table(english, clip, made):
    config, params = clip[1]
    embedding = made(*MULTI)
    half = Component(config, functional.cast(params, jnp.bfloat16))
    _, larger = add_embeddings(english, half, [embedding])
    table = larger.params["text_model.embeddings.token_embedding.embedding"]
    assert table.dtype == jnp.bfloat16 and larger.config.vocab_size == len(table) == config.vocab_size + 4
    np.testing.assert_array_equal(table[-4:], embedding.vectors.astype(jnp.bfloat16))
    with pytest.raises(UserError, match="not finite in float16"):
        half = Component(config, functional.cast(params, jnp.float16))
        add_embeddings(english, half, [Embedding("<a>", np.full((1, WIDTH), 1e5, np.float32))])


def test_files_that_do_not_fit(tmp_path):
    save_file({"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)}, tmp_path / "xl.safetensors")
    (both,) = load_embeddings(tmp_path / "xl.safetensors")
    assert {name: rows.shape for name, rows in both.vectors.items()} == {
        "text_encoder": (1, 768),
        "text_encoder_2": (1, 1280),
    }
    with pytest.raises(UserError, match="SDXL embedding, for text_encoder, text_encoder_2; here is no text_encoder_2"):
        for_encoders([both], {"text_encoder": 768})
    halves = for_encoders([both], {"text_encoder": 768, "text_encoder_2": 1280})
    assert {name: [(one.token, one.vectors.shape) for one in own] for name, own in halves.items()} == {
        "text_encoder": [("xl", (1, 768))],
        "text_encoder_2": [("xl", (1, 1280))],
    }
    one, other = Embedding("<a>", np.ones((2, 768))), Embedding("<a>", np.ones((3, 1280)))  # diffusers' two files
    halves = for_encoders([other, one], {"text_encoder": 768, "text_encoder_2": 1280})
    assert [len(own[0].vectors) for own in halves.values()] == [2, 3]
    named = [one._replace(aliases=("ink", "both")), other._replace(aliases=("ink_2", "both"))]
    halves = for_encoders(named, {"text_encoder": 768, "text_encoder_2": 1280})
    assert [own[0].aliases for own in halves.values()] == [("both",), ("both",)]
    with pytest.raises(UserError, match="<a>: has no vectors for the text_encoder_2"):
        for_encoders([one], {"text_encoder": 768, "text_encoder_2": 1280})
    save_file({"clip_l": torch.ones(1, 768)}, tmp_path / "one.safetensors")
    assert load_embeddings(tmp_path / "one.safetensors")[0].token == "one"
    save_file({"<a>": torch.ones(1, 768), "<b>": torch.ones(1, 768)}, tmp_path / "two.safetensors")
    assert [embedding.token for embedding in load_embeddings(tmp_path / "two.safetensors")] == ["<a>", "<b>"]
    with pytest.raises(UserError, match="has 2 embeddings .<a>, <b>., which keep their names"):
        load_embeddings(tmp_path / "two.safetensors", "<c>")


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        ([("<a>", np.ones((1, 1024)))], "<a>: vectors of width 1024 .SD2.x or Chin.* for a text encoder of width 32"),
        ([("<a>", np.ones((1, 1280)))], "width 1280 .SDXL"),
        ([("<a>", np.ones((2, 33)))], "width 33 for a text encoder of width 32"),
        ([("<a>", np.ones(WIDTH))], r"<a>: vectors of shape \(32,\); expected \(N, 32\)"),
        ([("<a>", np.ones((0, WIDTH)))], r"of shape \(0, 32\)"),
        ([("<a>", np.full((1, WIDTH), np.nan))], "not finite in float32"),
        ([("<a>", np.full((1, WIDTH), 1e300))], "not finite in float32"),
        ([("<a>", np.ones((376, WIDTH)))], "376 vectors, but a prompt holds 375 tokens"),
        ([("<a>", np.ones((1, WIDTH))), ("<A>", np.ones((1, WIDTH)))], "<A>: two embeddings have this name"),
        ([("a" * 10**6, np.ones((1, WIDTH)))], "1000000 characters; give it another name"),
        ([("a\0b", np.ones((1, WIDTH)))], "no text that can be written"),
        ([("lantern", np.ones((1, WIDTH)))], "'lantern': a word of the vocabulary already"),
    ],
)
def test_what_is_refused_is_named(embeddings, message, english, clip):
    with pytest.raises(UserError, match=message) as caught:
        add_embeddings(english, clip[1], [Embedding(*embedding) for embedding in embeddings])
    assert "\n" not in str(caught.value)


def test_only_text_towers_have_words(english, made):
    with pytest.raises(UserError, match="for text encoders, not for a UNetConfig"):
        add_embeddings(english, Component(UNetConfig(), {}), [made(*SINGLE)])


def test_a_token_that_was_added_before(english, clip, made):
    once = add_embeddings(english, clip[1], [made(*SINGLE)])
    with pytest.raises(UserError, match="'<birb>': added already"):
        add_embeddings(*once, [made(*SINGLE)])


def _flat(tokenizer, component):
    return tokenizer, *component
