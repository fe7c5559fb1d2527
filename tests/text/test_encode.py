"""Long prompts through a text tower, against transformers window by window."""

import numpy as np
import pytest
import torch
import transformers
from transformers.models.chinese_clip.modeling_chinese_clip import ChineseCLIPTextModel

from bdm_jax.models.config import CLIPTextConfig, RobertaConfig
from bdm_jax.paths import TOKENIZERS
from bdm_jax.text.encode import encode, tokenize
from bdm_jax.text.tokenizer import PromptWarning, Tokenizer

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
LONG = {"english": "a red lantern under a snowy roof at night and a dog ", "chinese": "雪夜屋檐下的红灯笼与一只狗，"}
SHORT = {"english": "a cat", "chinese": "猫"}


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
