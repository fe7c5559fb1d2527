"""Long and weighted prompts through a text tower: against transformers window by window, weights against numpy."""

import json
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.chinese_clip.modeling_chinese_clip import ChineseCLIPTextModel

from bdm_jax.models.config import CLIPTextConfig, RobertaConfig
from bdm_jax.models.unet.conditioning import Conditioning
from bdm_jax.paths import TOKENIZERS
from bdm_jax.text.encode import encode, encode_ids, encode_windows, read, tokenize, weigh
from bdm_jax.text.tokenizer import PromptWarning, Tokenizer

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
LONG = {"english": "a red lantern under a snowy roof at night and a dog ", "chinese": "雪夜屋檐下的红灯笼与一只狗，"}
SHORT = {"english": "a cat", "chinese": "猫"}
PROMPTS = Path(__file__).parents[3] / "shared/data/prompts/BDM_870.json"


def tower(language, tokenizer, randomised, torch_params):
    sizes = dict(SIZES, vocab_size=tokenizer.vocab_size, max_position_embeddings=16)
    if language == "chinese":
        module = ChineseCLIPTextModel(transformers.ChineseCLIPTextConfig(**sizes), add_pooling_layer=False)
        config = RobertaConfig(**sizes, type_vocab_size=2)
        return randomised(module), config, torch_params(module, config)
    ids = dict(bos_token_id=tokenizer.start, eos_token_id=tokenizer.end, pad_token_id=tokenizer.pad)
    module = transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes, **ids))
    config = CLIPTextConfig(**sizes, **ids)
    return randomised(module), config, torch_params(module, config, prefix="text_model.")


@pytest.mark.parametrize("language", ["english", "chinese"])
def test_windows_through_the_tower(language, randomised, torch_params, assert_parity):
    tokenizer = Tokenizer.from_pretrained(TOKENIZERS / language)
    module, config, params = tower(language, tokenizer, randomised, torch_params)
    texts = [SHORT[language], LONG[language] * 2, ""]
    ids = tokenize(tokenizer, texts)
    assert ids.shape[1] > 1
    states = [module(torch.from_numpy(ids[:, i].astype(np.int64))).last_hidden_state for i in range(ids.shape[1])]
    parts = [states[0][:, :-1], *(state[:, 1:-1] for state in states[1:-1]), states[-1][:, 1:]]
    cond = encode(tokenizer, config, params, texts)
    assert cond.mask is None
    assert_parity(cond.tokens, torch.cat(parts, dim=1).numpy())


@pytest.mark.parametrize("language", ["english", "chinese"])
def test_one_window_is_the_plain_tower(language, randomised, torch_params, assert_parity):
    tokenizer = Tokenizer.from_pretrained(TOKENIZERS / language)
    module, config, params = tower(language, tokenizer, randomised, torch_params)
    plain = module(torch.from_numpy(tokenizer([SHORT[language], ""]).astype(np.int64))).last_hidden_state
    assert_parity(encode(tokenizer, config, params, [SHORT[language], ""]).tokens, plain.numpy())


def test_more_than_five_windows_are_cut_and_named():
    tokenizer = Tokenizer.from_pretrained(TOKENIZERS / "chinese")
    with pytest.warns(PromptWarning, match="has 75 tokens, 70 are read; cut off: '宙 洪 荒 日 月'"):
        ids = tokenize(tokenizer, ["天地玄黄宇" * 14 + "宙洪荒日月", "猫"])
    assert ids.shape == (2, 5, 16)
    assert ids[1, 1:].tolist() == [[101, 102] + [0] * 14] * 4


@pytest.fixture(scope="module")
def chinese():
    """With BDM's own windows."""
    return Tokenizer.from_pretrained(TOKENIZERS / "chinese", 52)


@pytest.fixture(scope="module")
def english():
    return Tokenizer.from_pretrained(TOKENIZERS / "clip")


@pytest.mark.parametrize(
    ("characters", "windows", "last"),
    [(0, 1, 1), (1, 1, 2), (49, 1, 50), (50, 1, 51), (51, 2, 2), (100, 2, 51), (101, 3, 2), (250, 5, 51), (251, 5, 51)],
)
@pytest.mark.filterwarnings("ignore::bdm_jax.text.tokenizer.PromptWarning")
def test_chinese_windows(chinese, characters, windows, last):
    """Where the end token of the last window is; a full window has it in its last place."""
    (ids,), (weights,), *_ = read(chinese, ["猫" * characters])
    assert ids.shape == weights.shape == (windows, 52) and (weights == 1).all()
    assert ids[:, 0].tolist() == [101] * windows and ids[:-1, -1].tolist() == [102] * (windows - 1)
    assert np.flatnonzero(ids[-1] == 102).tolist() == [last] and not ids[-1, last + 1 :].any()
    assert (ids == chinese.content(["猫"])[0][0]).sum() == min(characters, 250)


@pytest.mark.parametrize(("words", "windows"), [(0, 1), (75, 1), (76, 2), (150, 2), (375, 5)])
def test_english_windows(english, words, windows):
    (ids,), *_ = read(english, ["cat " * words])
    assert ids.shape == (windows, 77)
    assert ids[:, 0].tolist() == [49406] * windows and ids[:, -1].tolist() == [49407] * windows
    assert (ids == 2368).sum() == words


def test_an_empty_window_is_an_empty_text_and_weighs_nothing(chinese):
    ids, weights, *_ = read(chinese, ["（猫：2）", "猫" * 51])
    assert ids[0].tolist() == [[101, 4344, 102] + [0] * 49, [101, 102] + [0] * 50]
    assert weights[0].tolist() == [[1, 2] + [1] * 50, [1] * 52]


def test_segments_are_tokenized_on_their_own(chinese, english):
    ids, weights, *_ = read(chinese, ["(红:1.5)灯[笼]"])
    assert ids[0, 0, :5].tolist() == [101, 5273, 4128, 5021, 102]
    np.testing.assert_allclose(weights[0, 0, :6], [1, 1.5, 1, 1 / 1.1, 1, 1], rtol=1e-6)
    assert weights.dtype == np.float32 and ids.dtype == np.int32
    ids, weights, *_ = read(english, ["photo(graph:1.2)", r"photo\(graph\)"])
    one, two, whole = english.content(["photo", "graph", "photo(graph)"])
    assert ids[0, 0, 1:3].tolist() == one + two and weights[0, 0, :4].tolist() == [1, 1, np.float32(1.2), 1]
    assert ids[1, 0, 1 : 1 + len(whole)].tolist() == whole and (weights[1] == 1).all()


def test_weights_go_with_their_tokens_into_the_next_window(chinese):
    ids, weights, *_ = read(chinese, ["猫" * 49 + "(红灯:1.5)"])
    assert (ids[0, 0, 50], weights[0, 0, 50], weights[0, 0, 51]) == (5273, 1.5, 1)
    assert (ids[0, 1, 1], weights[0, 1, 1], weights[0, 1, 2]) == (4128, 1.5, 1)


def test_break_begins_a_window(chinese, english):
    ids, weights, *_ = read(chinese, ["红BREAK(灯BREAK 笼:2) BREAK", "猫"])
    assert ids[0, :, :3].tolist() == [[101, 5273, 102], [101, 4128, 102], [101, 5021, 102]]
    assert weights[0, :, 1].tolist() == [1, 2, 2]
    assert ids[1, 1:, :2].tolist() == [[101, 102]] * 2
    assert tokenize(english, ["a BREAK cat"])[0, :, 1].tolist() == [320, 2368]
    with pytest.warns(PromptWarning, match="has 6 tokens, 5 are read; cut off: '笼'"):
        assert tokenize(chinese, [" BREAK ".join("猫狗鸟红灯笼")]).shape == (1, 5, 52)


def test_weighted_chinese_prompts_hold_no_unknown_token(chinese):
    prompts = ["（红：1.3）灯笼，[[雪夜]]，(屋檐下的(狗):0.8) BREAK ［猫］", r"\(红\)灯笼"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids, weights, *_ = read(chinese, prompts)
    assert 100 not in ids and (weights[0] != 1).any()
    shown = chinese._tokenizer.convert_ids_to_tokens(ids[1, 0, 1:7].tolist())
    assert shown == ["(", "红", ")", "灯", "笼", "[SEP]"]


def test_characters_without_a_token_are_named_once_with_the_whole_prompt(chinese):
    with pytest.warns(PromptWarning) as caught:
        read(chinese, ["龙(☃:2)和𠮷(☃:2)"])
    assert [str(warning.message) for warning in caught] == [
        "the prompt '龙(☃:2)和𠮷(☃:2)' has characters that the vocabulary lacks: ☃ 𠮷"
    ]


def test_reference(chinese, english):
    """Chinese weights are parsed, then dropped; full-width brackets are text; English weights count."""
    ids, weights, *_ = read(chinese, ["(红:1.5)灯笼", "（红）BREAK"], reference=True)
    assert ids[0, 0, :5].tolist() == [101, 5273, 4128, 5021, 102] and (weights == 1).all()
    assert chinese._tokenizer.convert_ids_to_tokens(ids[1, 0, 1:5].tolist()) == ["（", "红", "）", "break"]
    ids, weights, *_ = read(english, ["Batman: Dark Knight (Poster)"], reference=True)
    assert weights[0, 0, :7].tolist() == [1, 1, 1, 1, 1, np.float32(1.1), 1]


def test_the_870_prompts_hold_no_unknown_token(chinese):
    if not PROMPTS.is_file():
        pytest.skip(f"{PROMPTS} is not there")
    rows = json.loads(PROMPTS.read_text("utf-8"))
    assert len(rows) == 870
    for reference in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert 100 not in tokenize(chinese, [row[1] for row in rows], reference=reference)


def by_formula(states, weights):
    """Sample by sample in float64; `weights` (B, n, length), laid end to end as the states are."""
    inner = weights[:, :, 1:-1].reshape(len(weights), -1)
    factors = np.concatenate([weights[:, 0, :1], inner, weights[:, -1, -1:]], axis=1).astype(np.float64)
    weighted = states.astype(np.float64) * factors[:, :, None]
    scale = states.astype(np.float64).mean(axis=(1, 2)) / weighted.mean(axis=(1, 2))
    return weighted * scale[:, None, None]


@pytest.mark.parametrize("windows", [1, 3])
def test_weighting_is_the_formula(rng, windows):
    weights = rng.uniform(0.3, 2, (4, windows, 16)).astype(np.float32)
    states = rng.normal(0.2, 1, (4, windows * 14 + 2, 24)).astype(np.float32)
    found = weigh(Conditioning(jnp.asarray(states)), weights).tokens
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, by_formula(states, weights), rtol=2e-5, atol=1e-6)  # fp32 means of 1000 numbers
    np.testing.assert_allclose(found.mean(axis=(1, 2)), states.mean(axis=(1, 2)), rtol=1e-4)


def test_weighting_keeps_the_dtype_and_unweighted_neighbours(rng):
    states = jnp.asarray(rng.normal(0.2, 1, (2, 16, 8)), jnp.bfloat16)
    weights = np.ones((2, 1, 16), np.float32)
    weights[1, 0, 3] = 1.5
    found = weigh(Conditioning(states), weights).tokens
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found[0], states[0])
    assert (found[1, 3] != states[1, 3]).all()


@pytest.mark.parametrize("case", ["mean before", "mean after", "sign"])
def test_a_mean_near_zero_leaves_the_states_unscaled(case):
    states = np.ones((1, 16, 8), np.float32)
    weights = np.ones((1, 1, 16), np.float32)
    states[:, ::2] = {"mean before": -1, "mean after": -0.5, "sign": -0.5}[case]
    weights[:, :, ::2] = {"mean before": 1.5, "mean after": 2, "sign": 3}[case]
    found = weigh(Conditioning(jnp.asarray(states)), weights).tokens
    np.testing.assert_array_equal(found, states * weights[0, 0][None, :, None])


@pytest.mark.parametrize("language", ["english", "chinese"])
def test_weights_through_the_tower(language, randomised, torch_params):
    tokenizer = Tokenizer.from_pretrained(TOKENIZERS / language)
    _, config, params = tower(language, tokenizer, randomised, torch_params)
    params = {key: value + 0.5 if key.endswith("norm.bias") else value for key, value in params.items()}
    params = {key: value + 0.5 if key.endswith("LayerNorm.bias") else value for key, value in params.items()}
    plain = SHORT[language]
    cond = encode(tokenizer, config, params, [f"({plain}:1.5)", plain])
    ids, weights, *_ = read(tokenizer, [f"({plain}:1.5)", plain])
    states = np.asarray(encode_ids(config, params, ids).tokens)
    np.testing.assert_allclose(cond.tokens, by_formula(states, weights), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(cond.tokens[1], states[1])
    np.testing.assert_array_equal(encode(tokenizer, config, params, [plain, plain]).tokens, states[[1, 1]])
    assert jax.tree.structure(cond) == jax.tree.structure(Conditioning(states))


def test_weights_compile_nothing_anew(randomised, torch_params):
    tokenizer = Tokenizer.from_pretrained(TOKENIZERS / "chinese")
    _, config, params = tower("chinese", tokenizer, randomised, torch_params)
    encode(tokenizer, config, params, ["(红:1.5)灯笼"])
    programs = encode_windows.count(), weigh._cache_size()
    for prompt in ("红灯笼", "[雪]山", "((猫))", "(狗:-1)"):
        encode(tokenizer, config, params, [prompt])
    assert (encode_windows.count(), weigh._cache_size()) == programs
