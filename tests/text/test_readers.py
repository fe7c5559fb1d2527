"""Readers of several text encoders, and of encoders with other windows than CLIP's: padding on the left, no start."""

from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import Unigram

from bdm_jax.errors import UserError
from bdm_jax.models import functional
from bdm_jax.models.config import CLIPTextConfig, RobertaConfig
from bdm_jax.paths import TOKENIZERS
from bdm_jax.systems.components import Component
from bdm_jax.text import readers
from bdm_jax.text.encode import EncoderCall, encode_ids, encode_windows, read
from bdm_jax.text.tokenizer import Tokenizer
from bdm_jax.text.towers import Reader, Tower
from bdm_jax.text.windows import WindowFormat, join

TEXT = dict(
    hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16
)


@pytest.fixture(scope="module")
def english():
    return Tokenizer.from_pretrained(TOKENIZERS / "english")


@pytest.fixture(scope="module")
def chinese():
    return Tokenizer.from_pretrained(TOKENIZERS / "chinese", 16)


@pytest.fixture
def parts(english, chinese, seed):
    ids = dict(bos_token_id=english.start, eos_token_id=english.end, pad_token_id=english.pad)
    configs = {
        "one": CLIPTextConfig(**TEXT, **ids, vocab_size=english.vocab_size),
        "two": RobertaConfig(**TEXT, vocab_size=chinese.vocab_size),
    }
    networks = {name: Component(config, functional.init(config, seed)) for name, config in configs.items()}
    return {**networks, "first": english, "second": chinese}


ONE, TWO = Tower("one", "first"), Tower("two", "second")


@pytest.mark.parametrize("join_on", ["width", "tokens"])
def test_joined(join_on, parts):
    reader = Reader("backbone", (ONE, TWO), join_on)
    tokens = readers.read(reader, parts, ["red 灯", ""], masked=True)
    found = readers.encode(reader, parts, tokens)
    each = [encode_ids(*parts[name], own.ids).tokens for name, own in zip(("one", "two"), tokens, strict=True)]
    masked = encode_windows(EncoderCall(parts["two"].config), parts["two"].params, tokens[1].ids, tokens[1].mask)
    expected = np.concatenate([each[0], masked.tokens], axis=-1 if join_on == "width" else 1)
    assert found.tokens.shape == ((2, 16, 32) if join_on == "width" else (2, 32, 16))
    np.testing.assert_array_equal(found.tokens, expected)
    assert readers.width(reader, parts) == found.tokens.shape[-1]
    assert tokens[0].mask is None and not tokens[1].mask.all()  # CLIP's padding is read
    if join_on == "width":
        assert found.mask.all()
    else:
        np.testing.assert_array_equal(found.mask, np.concatenate([np.ones((2, 16), bool), tokens[1].mask[:, 0]], 1))


def test_as_many_windows_as_the_longest_where_joined_on_width(parts):
    prompt = "雪夜屋檐下的红灯笼与一只小狗和猫"  # one window of Chinese tokens, more of a small byte-pair vocabulary
    wide, long = Reader("b", (ONE, TWO), "width"), Reader("b", (ONE, TWO), "tokens")
    counts = [tokens.ids.shape[1] for tokens in readers.read(long, parts, [prompt])]
    assert counts[0] > counts[1]
    tokens = readers.read(wide, parts, [prompt])
    assert [own.ids.shape[1] for own in tokens] == [counts[0]] * 2
    blank = parts["second"].format.fill([], 1)
    np.testing.assert_array_equal(tokens[1].ids[0, counts[1] :], np.repeat(blank, counts[0] - counts[1], 0))
    assert readers.encode(wide, parts, tokens).tokens.shape == (1, counts[0] * 14 + 2, 32)


def test_weights_of_each_encoder(parts):
    """Each encoder's states are weighed by its own tokens' weights; the pooled vector is not."""
    reader = Reader("b", (replace(ONE, pooled=True), TWO))
    plain, weighted = (
        readers.encode(reader, parts, readers.read(reader, parts, [prompt])) for prompt in ("cat", "(cat:1.5)")
    )
    alone = [
        readers.encode(Reader("b", (tower,)), parts, readers.read(Reader("b", (tower,)), parts, ["(cat:1.5)"]))
        for tower in (ONE, TWO)
    ]
    np.testing.assert_allclose(weighted.tokens[..., :16], alone[0].tokens, atol=1e-5)
    np.testing.assert_allclose(weighted.tokens[..., 16:], alone[1].tokens, atol=1e-5)
    assert np.abs(weighted.tokens - plain.tokens).max() > 1e-2
    np.testing.assert_allclose(weighted.pooled, plain.pooled, atol=1e-6)


def test_an_empty_prompt_may_be_zeros(parts):
    reader = Reader("b", (replace(ONE, pooled=True),), zero_empty=True)
    found = readers.encode(reader, parts, readers.read(reader, parts, ["", "cat"]))
    whole = readers.encode(replace(reader, zero_empty=False), parts, readers.read(reader, parts, ["", "cat"]))
    assert not np.any(found.tokens[0]) and not np.any(found.pooled[0]) and np.any(whole.tokens[0])
    np.testing.assert_array_equal(found.tokens[1], whole.tokens[1])
    np.testing.assert_array_equal(found.pooled[1], whole.pooled[1])


def test_what_cannot_be_joined_is_named(parts, chinese):
    wider = {**parts, "second": Tokenizer.from_pretrained(TOKENIZERS / "chinese", 20)}
    with pytest.raises(UserError, match="first and second cannot be joined on width: tokens in a window 14 and 18"):
        readers.check(Reader("b", (ONE, TWO)), wider)
    readers.check(Reader("b", (ONE, TWO), "tokens"), wider)
    config, params = parts["two"]
    other = {**parts, "two": Component(replace(config, hidden_size=8), params)}
    with pytest.raises(UserError, match="one and two cannot be joined on tokens: text width 16 and 8"):
        readers.check(Reader("b", (ONE, TWO), "tokens"), other)
    readers.check(Reader("b", (ONE, TWO)), other)


# ------------------------------------------------------------------------------------- padding on the left (ChatGLM)

PREFIX = (64790, 64792)  # ChatGLM's [gMASK] sop


def test_left_padded_window_by_hand():
    window = WindowFormat(8, PREFIX, (), 0, left=True)
    assert (window.room, window.most) == (6, 1)
    ids = window.fill([[5, 6, 7]], 1)
    assert ids.tolist() == [[0, 0, 0, *PREFIX, 5, 6, 7]]
    assert window.fill([], 1).tolist() == [[0] * 6 + [*PREFIX]]
    assert window.fill_weights([[2.0, 3.0]], 1).tolist() == [[1, 1, 1, 1, 1, 1, 2, 3]]
    assert window.content_mask([[5]], 1).tolist() == [[False] * 5 + [True] * 3]
    assert window.cut([range(8)]) == [range(6), range(6, 8)]


@dataclass(frozen=True)
class PositionsConfig:
    """A text encoder that gives back what it is called with."""

    vocab_size: int = 70000
    hidden_size: int = 3
    num_hidden_layers: int = 1


class Positions(nnx.Module):
    """(ids, mask, positions) (B,S) -> them as states (B,S,3)."""

    def __init__(self, config, rngs):
        self.scale = nnx.Param(jnp.ones(()))

    def __call__(self, ids, mask, positions):
        return jnp.stack([ids, mask, positions], axis=-1) * self.scale[...]


def test_left_padding_with_a_real_tokenizer(chinese, monkeypatch):
    """Pads first, positions 0 .. n-1 on what is no padding, 0 on padding; what reads the states attends to all."""
    monkeypatch.setitem(functional._NETWORKS, PositionsConfig, Positions)
    original = transformers.BertTokenizer.from_pretrained(TOKENIZERS / "chinese", padding_side="left")
    tokenizer = Tokenizer(original, 8, prefix=PREFIX)
    assert tokenizer.format.left and tokenizer.start == PREFIX[0]
    content = original("红灯", add_special_tokens=False).input_ids
    tokens = read(tokenizer, ["红灯", ""])
    assert tokens.ids[0, 0].tolist() == [0] * 3 + [*PREFIX, *content, tokenizer.end]
    assert tokens.positions[0, 0].tolist() == [-1] * 3 + [0, 1, 2, 3, 4]
    parts = {"states": Component(PositionsConfig(), {"scale": jnp.ones(())}), "tokenizer": tokenizer}
    reader = Reader("backbone", (Tower("states", "tokenizer"),))
    cond = readers.encode(reader, parts, readers.read(reader, parts, ["红灯", ""]))
    assert cond.mask is None and cond.tokens.shape == (2, 8, 3)
    np.testing.assert_array_equal(cond.tokens[:, :, 0], tokens.ids[:, 0])
    np.testing.assert_array_equal(cond.tokens[:, :, 1], tokens.positions[:, 0] >= 0)
    assert cond.tokens[0, :, 2].tolist() == [0, 0, 0, 0, 1, 2, 3, 4]
    with pytest.warns(UserWarning, match="are read; cut off"):
        assert read(tokenizer, ["红灯" * 9]).ids.shape == (1, 1, 8)


# ------------------------------------------------------------------------------------------- no start token (T5)


@pytest.fixture
def t5(tmp_path):
    """A tokenizer folder in T5's layout: ids 0 padding, 1 end, 2 unknown; no start."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in ("a", "red", "cat"))]
    model = FastTokenizer(Unigram([*pieces, ("▁", -3.0)], unk_id=2))
    from tokenizers.pre_tokenizers import Metaspace

    model.pre_tokenizer = Metaspace()
    fast = transformers.T5TokenizerFast(tokenizer_object=model, extra_ids=0)
    fast.save_pretrained(tmp_path)
    return tmp_path


def test_no_start_token(t5):
    tokenizer = Tokenizer.from_pretrained(t5, 6)
    assert (tokenizer.start, tokenizer.end, tokenizer.pad) == (None, 1, 0)
    assert tokenizer.format == WindowFormat(6, (), (1,), 0) and tokenizer.format.room == 5
    tokens = read(tokenizer, ["a red cat", ""])
    assert tokens.ids[:, 0].tolist() == [[3, 4, 5, 1, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert tokens.positions is None
    long = read(tokenizer, ["a red cat a red cat"])
    assert long.ids[0].tolist() == [[3, 4, 5, 3, 4, 1], [5, 1, 0, 0, 0, 0]]
    states = np.arange(12, dtype=np.float32).reshape(1, 2, 6, 1)
    assert join(states, 0, 1)[0, :, 0].tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
