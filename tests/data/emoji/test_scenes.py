"""Scenes: what is drawn, by hand; what is told, in both languages; what never appears; as a set that is trained on."""

import io
import zlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from bdm_jax.data.captions import caption, is_written_in
from bdm_jax.data.emoji import scenes
from bdm_jax.data.emoji.plurals import is_plural, plural
from bdm_jax.data.emoji.scenes import COUNTS, GROUNDS, KINDS, PLACES, Cutouts, Scene, Scenes
from bdm_jax.data.records import open_source
from bdm_jax.errors import BadRecord, UserError
from bdm_jax.images.decode import check_cutout, decode_cutout, decode_image
from bdm_jax.latents.moments import record_moments
from bdm_jax.models.config import VAEConfig
from bdm_jax.models.functional import init
from bdm_jax.paths import EMOJI, TOKENIZERS
from bdm_jax.systems.components import Component
from bdm_jax.text.tokenizer import Tokenizer
from bdm_jax.training.config import TrainConfig
from bdm_jax.training.loop import train
from bdm_jax.training.objectives.autoencoder import VAETask
from bdm_jax.training.sets import DataConfig, Sets

NAMES = (("红灯笼", "red lantern"), ("熊猫", "panda"), ("饺子", "dumpling"), ("眼镜", "glasses"), ("龙", "dragon"))


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def random_pixels(seed, height=128, width=128):
    """RGBA of which a third is clear, a third opaque, a third between."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (height, width, 4), dtype=np.uint8)
    pixels[: height // 3, :, 3], pixels[-(height // 3) :, :, 3] = 0, 255
    return pixels


def opaque_pixels(pixels):
    return np.dstack([pixels[..., :3], np.full(pixels.shape[:2], 255, np.uint8)])


class Artwork(list):
    """Records as the bundled set has them: forty things in two styles, the first of each five of Chinese culture."""

    fingerprint = "forty"

    def contents(self):
        return "the same"


@pytest.fixture(scope="module")
def artwork():
    rows = []
    for style in ("fluent", "noto"):
        for number in range(40):
            zh, en = NAMES[number % 5]
            row = {"id": f"{number:x}", "style": style, "zh": f"{zh}{number}", "en": f"{en} {'abcdefgh'[number // 5]}"}
            row |= {"zh_keywords": ["灯", "节日"], "en_keywords": ["light"], "zh_only": number % 5 == 0}
            rows.append({**row, "key": f"train/{len(rows)}", "image": png(random_pixels(len(rows), 32, 32))})
    return Artwork(rows)


@pytest.fixture(scope="module")
def cutouts(artwork):
    return Cutouts(artwork)


@pytest.fixture(scope="module")
def many(cutouts):
    return [scenes.random_scene(cutouts, 0, number, images=False) for number in range(6000)]


def over(canvas, patch):
    """Alpha compositing in floats: colours (h,w,3), RGBA of 0 .. 255 (h,w,4)."""
    alpha = patch[..., 3:] / 255
    return patch[..., :3] * alpha + canvas * (1 - alpha)


def premultiplied_mean(pixels, k):
    """RGBA -> RGBA of every k x k block: colours weighted by alpha, alpha averaged."""
    blocks = pixels.reshape(pixels.shape[0] // k, k, pixels.shape[1] // k, k, 4).astype(float)
    alpha = blocks[..., 3].mean((1, 3))
    colour = (blocks[..., :3] * blocks[..., 3:]).mean((1, 3)) / np.maximum(alpha, 1e-9)[..., None]
    return np.concatenate([colour, alpha[..., None]], axis=-1)


def record(pixels, **more):
    return {"id": "1f43c", "key": "x", "style": "fluent", "zh": "熊猫", "en": "panda", "image": png(pixels), **more}


def assert_close(found, expected, tolerance):
    assert found.dtype == np.uint8 and found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance


# Rounded to 8 bits: colours times alpha (half a level), alpha (half a level of at most 255), the sum (half a level).
ROUNDED = 1.6


def test_one_thing_lies_on_white_as_without_a_scene():
    pixels = random_pixels(0)
    found = scenes.compose(Scene("plain", (record(pixels),)))
    assert_close(found, over(np.full((128, 128, 3), 255.0), pixels.astype(float)), ROUNDED)
    assert_close(found, decode_image(png(pixels)).astype(float), ROUNDED)


def test_a_ground_lies_behind_it_with_its_shade():
    pixels = random_pixels(1)
    ground = np.zeros((128, 128, 3)) + np.array([120, 170, 230]) + [3, -4, 30]  # 260 is 255
    found = scenes.compose(Scene("ground", (record(pixels),), ground="blue", shade=(3.0, -4.0, 30.0)))
    assert_close(found, over(np.minimum(ground, 255), pixels.astype(float)), ROUNDED)


@pytest.mark.parametrize(("place", "x", "y"), [("on the left", 4, 32), ("at the bottom", 32, 60)])
def test_a_small_thing_lies_at_its_place(place, x, y):
    pixels = random_pixels(2)
    expected = np.full((128, 128, 3), 255.0)
    x, y = x + 3, y - 2
    expected[y : y + 64, x : x + 64] = over(expected[y : y + 64, x : x + 64], premultiplied_mean(pixels, 2))
    assert_close(scenes.compose(Scene("small", (record(pixels),), place=place, shift=(3, -2))), expected, ROUNDED)


def test_three_things_lie_side_by_side():
    """126 pixels are 42 times 3, so that areas are whole pixels; 128 are not, see the next test."""
    pixels = random_pixels(3, 126, 126)
    expected, small = np.full((128, 128, 3), 255.0), premultiplied_mean(pixels, 3)
    for x in (1, 43, 85):
        expected[43:85, x : x + 42] = over(expected[43:85, x : x + 42], small)
    assert_close(scenes.compose(Scene("count", (record(pixels),), count=3)), expected, ROUNDED)


def test_areas_are_those_of_fine_pixels():
    """128 -> 42 through their common multiple, 2688 = 128 x 21 = 42 x 64."""
    pixels = random_pixels(4)
    fine = pixels.repeat(21, axis=0).repeat(21, axis=1)
    small = premultiplied_mean(fine, 64)
    expected = np.zeros((128, 128, 3)) + GROUNDS["pink"].rgb
    for x in (1, 43, 85):
        expected[43:85, x : x + 42] = over(expected[43:85, x : x + 42], small)
    assert_close(scenes.compose(Scene("count", (record(pixels),), ground="pink", count=3)), expected, ROUNDED)


def test_a_pair_lies_left_and_right_and_what_is_not_square_is_centred():
    tall, wide = random_pixels(5, 128, 64), random_pixels(6, 32, 128)
    expected = np.full((128, 128, 3), 255.0)
    expected[32:96, 16:48] = over(expected[32:96, 16:48], premultiplied_mean(tall, 2))
    expected[56:72, 64:128] = over(expected[56:72, 64:128], premultiplied_mean(wide, 2))
    assert_close(scenes.compose(Scene("pair", (record(tall), record(wide)))), expected, ROUNDED)


def test_other_sizes_have_the_same_layout():
    opaque = np.full((256, 256, 4), [200, 30, 40, 255], np.uint8)
    for kind in ({"kind": "count", "count": 2}, {"kind": "small", "place": "on the right"}):
        scene = Scene(records=(record(opaque),), ground="green", **kind)
        large, usual = scenes.compose(scene, 256), scenes.compose(scene)
        np.testing.assert_array_equal(large[::2, ::2], usual)
    assert scenes.compose(Scene("count", (record(opaque),), count=3), 50).shape == (50, 50, 3)


def test_what_does_not_go_together_is_refused():
    one = record(random_pixels(0))
    for scene, told in (
        ({"kind": "pair", "records": (one,)}, "pair has two|2 things"),
        ({"kind": "small", "records": (one,)}, "place=None"),
        ({"kind": "plain", "records": (one,), "count": 2}, "count=2"),
        ({"kind": "count", "records": (one,), "count": 4}, "unknown count '4'"),
        ({"kind": "ground", "records": (one,), "ground": "grey"}, "did you mean 'gray'"),
        ({"kind": "large", "records": (one,)}, "unknown kind of scene"),
    ):
        with pytest.raises(UserError, match=told):
            Scene(**scene)


def told(kind, *names, **fields):
    rows = tuple({"id": en, "style": "fluent", "zh": zh, "en": en, "zh_only": zh == "红灯笼"} for zh, en in names)
    return scenes.captions(Scene(kind, rows, **fields))


def test_captions_are_natural_in_both_languages():
    panda, glasses, wolf = ("熊猫", "panda"), ("眼镜", "glasses"), ("狼", "wolf")
    assert told("plain", panda) == {"zh": "熊猫", "en": "panda"}
    keywords = {"zh": ("动物",), "en": ("animal", "bear")}
    assert told("plain", panda, keywords=keywords, style=True) == {
        "zh": "熊猫，动物，扁平插画",
        "en": "panda, animal, bear, flat illustration",
    }
    assert told("ground", panda, ground="blue") == {"zh": "熊猫，蓝色背景", "en": "panda, blue background"}
    assert told("ground", panda, ground="gray", ground_only=True) == {"zh": "灰色背景", "en": "gray background"}
    assert told("small", panda, place="at the top") == {"zh": "上边的小熊猫", "en": "a small panda at the top"}
    assert told("small", glasses, place="on the left")["en"] == "small glasses on the left"
    assert told("count", panda, count=2) == {"zh": "两个熊猫", "en": "two pandas"}
    assert told("count", wolf, count=3, ground="red") == {
        "zh": "三个狼，红色背景",
        "en": "three wolves, red background",
    }
    both = told("pair", panda, glasses, style=True)
    assert both["zh"] == "左边熊猫，右边眼镜，扁平插画"
    assert both["en"] == "panda on the left, glasses on the right, flat illustration"


def test_english_never_tells_of_chinese_culture():
    lantern, panda = ("红灯笼", "red lantern"), ("熊猫", "panda")
    assert told("count", lantern, count=2) == {"zh": "两个红灯笼", "en": None}
    assert told("pair", panda, lantern)["en"] is None and told("pair", panda, lantern)["zh"]


def test_captions_of_users_lose_their_article_where_something_comes_before_it():
    row = {"key": "a.png", "captions": ["一只熊猫", "a panda"], "zh": "一只熊猫", "en": "a panda", "zh_only": False}
    assert scenes.captions(Scene("plain", (row,), style=True)) == {"zh": "一只熊猫", "en": "a panda"}
    assert scenes.captions(Scene("count", (row,), count=2)) == {"zh": "两个熊猫", "en": "two pandas"}
    small = scenes.captions(Scene("small", ({**row, "zh": None},), place="on the right"))
    assert small == {"zh": None, "en": "a small panda on the right"}


def test_plurals():
    expected = {
        **{"panda": "pandas", "red envelope": "red envelopes", "fox": "foxes", "cherry blossom": "cherry blossoms"},
        **{"baby": "babies", "monkey": "monkeys", "wolf": "wolves", "snowman": "snowmen", "church": "churches"},
        **{"pile of poo": "piles of poo", "face with tears of joy": "faces with tears of joy", "ox": "oxen"},
        **{"woman running": "women running", "man mountain biking": "men mountain biking", "bus": "buses"},
        **{"woman artist": "women artists", "office building": "office buildings", "sled": "sleds"},
        **{"slightly smiling face": "slightly smiling faces", "page facing up": "pages facing up"},
        **{"red paper lantern": "red paper lanterns", "Statue of Liberty": "Statues of Liberty"},
        **{"glasses": "glasses", "hot springs": "hot springs", "sushi": "sushi", "flag: China": "flag: China"},
        **{"bow and arrow": "bow and arrow", "Leo": "Leo", "keycap: 8": "keycap: 8", "unlocked": "unlocked"},
        **{"no smoking": "no smoking", "A button (blood type)": "A button (blood type)"},
    }
    assert {name: plural(name) for name in expected} == expected
    assert [name for name in expected if is_plural(name)] == ["glasses", "hot springs"]


def test_the_rule_of_what_is_held_out():
    for concept, attribute in (("1f43c", "blue"), ("1f43c", "x2"), ("a", "on the left")):
        assert scenes.held_out(concept, attribute) == (zlib.crc32(f"{concept}/{attribute}".encode()) % 10 == 0)
    pairs = [(f"{number:x}", colour) for number in range(1000) for colour in GROUNDS]
    assert 700 < sum(scenes.held_out(*pair) for pair in pairs) < 900


def test_what_is_held_out_never_appears(many):
    seen = Counter()
    for scene in many:
        attributes = {
            "ground": scene.ground,
            "place": scene.place,
            "count": f"x{scene.count}" if scene.count is not None else None,
        }
        for record in scene.records:
            for name, attribute in attributes.items():
                if attribute is not None:
                    assert not scenes.held_out(record["id"], attribute)
                    seen[name] += 1
    assert min(seen.values()) > 500
    everything = [(f"{n:x}", a) for n in range(40) for a in (*GROUNDS, *PLACES, "x2", "x3")]
    held = {pair for pair in everything if scenes.held_out(*pair)}
    appear = {(r["id"], scene.ground) for scene in many for r in scene.records if scene.ground}
    free = {(concept, attribute) for concept, attribute in everything if attribute in GROUNDS} - held
    assert len(held) > 20 and appear <= free and len(appear) > 0.95 * len(free), "the others do"


def test_shares(many):
    """Within five standard deviations; kinds lose only what is held out twice, which the forty concepts have not."""

    def holds(count, total, share):
        assert abs(count - total * share) < 5 * np.sqrt(total * share * (1 - share)), (count, total, share)

    kinds = Counter(scene.kind for scene in many)
    for kind, share in KINDS.items():
        holds(kinds[kind], len(many), share)
    assert {kind: KINDS[kind] for kind in KINDS} == {
        **{"plain": 0.5, "ground": 0.16, "small": 0.12},
        **{"count": 0.11, "pair": 0.11},
    }
    composed = [scene for scene in many if scene.kind in ("small", "count", "pair")]
    holds(sum(scene.ground is not None for scene in composed), len(composed), 0.25)
    alone = [scene for scene in many if scene.kind == "ground"]
    holds(sum(scene.ground_only for scene in alone), len(alone), 0.12)
    fluent = [scene for scene in many if scene.records[0]["style"] == "fluent"]
    holds(len(fluent), len(many), 0.65)
    holds(sum(scene.style for scene in fluent), len(fluent), 0.5)
    assert all(scene.style for scene in many if scene.records[0]["style"] == "noto")
    holds(sum(scene.records[0]["zh_only"] for scene in many), len(many), 0.1 + 0.9 * 8 / 40)
    places = Counter(scene.place for scene in many if scene.kind == "small")
    assert {*places} == {*PLACES} and {scene.count for scene in many if scene.kind == "count"} == {*COUNTS}
    assert all(scene.ground is None for scene in many if scene.kind == "plain")
    assert all(
        a["style"] == b["style"] and a["id"] != b["id"] for a, b in (s.records for s in many if len(s.records) == 2)
    )


def test_captions_are_in_their_script(many):
    for scene in many:
        found = scenes.captions(scene)
        assert is_written_in(found["zh"], "zh")
        hidden = any(row["zh_only"] for row in scene.records)
        assert (found["en"] is None) == hidden and (hidden or is_written_in(found["en"], "en"))
        assert ("背景" in found["zh"]) == (scene.ground is not None), "a white ground is never told, every other is"


def test_a_scene_is_the_same_whatever_was_drawn_before(artwork, cutouts):
    set_ = Scenes(cutouts, 50, seed=3)
    forward = [set_[number] for number in range(50)]
    other = Scenes(Cutouts(artwork), 1000, seed=3)
    for number in reversed(range(50)):
        assert other[number] == forward[number]
        assert other.words(number) == {name: forward[number][name] for name in forward[number] if name != "image"}
    assert Scenes(cutouts, 50, seed=4)[7]["image"] != forward[7]["image"]
    assert len({row["image"] for row in forward}) > 45
    with pytest.raises(IndexError):
        set_[50]


def test_records_are_read_as_those_of_any_set(cutouts):
    set_ = Scenes(cutouts, 300)
    rng = np.random.default_rng(0)
    english, chinese = set_.of_language("en"), set_.of_language("zh")
    assert len(chinese) == 300 and 150 < len(english) < 280
    for number in range(0, 300, 7):
        row, scene = set_[number], set_.scene(number)
        np.testing.assert_array_equal(decode_image(row["image"], strict=True), scenes.compose(scene))
        assert caption(row, "zh", rng, style=True) == scenes.captions(scene)["zh"]
        assert row["zh_only"] == (number not in english)
        if number in english:
            assert caption(row, "en", rng) == scenes.captions(scene)["en"]


def test_digests_change_with_the_artwork_the_seed_and_the_number(artwork, cutouts):
    usual, same = Scenes(cutouts, 50), Scenes(Cutouts(artwork), 50)
    assert (usual.fingerprint, usual.contents()) == (same.fingerprint, same.contents())
    assert len(usual.contents()) == 32 and len(usual.fingerprint) == 16
    other, changed = Artwork(artwork), Artwork(artwork)
    other.fingerprint = "others"
    changed.contents = lambda: "painted over"
    variants = [Scenes(cutouts, 51), Scenes(cutouts, 50, 1), Scenes(cutouts, 50, 0, 64), Scenes(Cutouts(other), 50)]
    variants.append(Scenes(Cutouts(artwork, range(79)), 50))
    assert len({usual.fingerprint, *(one.fingerprint for one in variants)}) == 6
    assert len({usual.contents(), Scenes(Cutouts(changed), 50).contents(), *(v.contents() for v in variants[:3])}) == 5


def test_a_picture_without_transparency_is_no_cutout(artwork):
    opaque = png(random_pixels(0)[..., :3])
    for check in (check_cutout, decode_cutout):
        with pytest.raises(BadRecord, match="a.png: it has no transparency; a cut-out is a PNG or WebP"):
            check(opaque, "a.png")
        check(png(random_pixels(0)), "a.png")
    found = Cutouts([{**artwork[0], "image": opaque}, *artwork[1:]])
    assert list(found.faults) == [0] and found.indices == list(range(1, 80))
    empty = Cutouts([{**artwork[0], "image": opaque}])
    with pytest.raises(UserError, match="nothing that scenes can be composed of: 0: it has no transparency"):
        scenes.random_scene(empty, 0, 0)


def test_alpha_decides_what_a_cutout_is(artwork):
    """Only the bundled set, which has art styles, has things that fill their picture ("face in clouds")."""
    pixels = random_pixels(0, 32, 32)
    full, clear, damaged = png(opaque_pixels(pixels)), png(pixels * np.uint8([1, 1, 1, 0])), png(pixels)[:-2000]
    faint = pixels.copy()
    faint[..., 3] = 255
    faint[0, 0, 3] = 254
    check_cutout(png(faint), "a.png")
    check_cutout(full, "a.png", full=True)
    decode_cutout(full), decode_cutout(clear)
    causes = {"nothing in it is transparent": full, "all of it is transparent": clear, "cannot be read": damaged}
    for cause, image in causes.items():
        with pytest.raises(BadRecord, match=f"a.png: .*{cause}"):
            check_cutout(image, "a.png")
    own = [{"key": f"{i}.png", "captions": ["a cat"], "image": image} for i, image in enumerate(causes.values())]
    assert list(Cutouts(own).faults) == [0, 1, 2]
    assert list(Cutouts([{**artwork[0], **row} for row in own]).faults) == [1, 2]


@pytest.fixture
def folder(tmp_path):
    """A user's own cut-outs: most with captions in both languages."""
    for number, (zh, en) in enumerate(NAMES):
        Image.fromarray(random_pixels(number, 40, 60)).save(tmp_path / f"{number}.png")
        lines = [zh] if number == 4 else [zh, f"a {en}", f"the {en}"]
        (tmp_path / f"{number}.txt").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


def test_own_cutouts_are_trained_on(folder):
    data = DataConfig(folder, scenes=200, scene_size=64, seed=5)
    (chinese,), (english,) = (Sets(data, language).images() for language in ("zh", "en"))
    assert len(chinese.indices) == 200 and 100 < len(english.indices) < 200
    row = english.source[3]
    assert decode_image(row["image"]).shape == (64, 64, 3) and row["en"] and not row["zh_only"]
    assert {text.split()[0] for text in (english.source[i]["en"] for i in range(60))} >= {"a", "the", "two", "three"}
    direct = Scenes(Cutouts(open_source(folder)), 200, 5, 64)
    assert chinese.source[3] == direct[3], "the same scenes for both languages"
    before = Sets(data, "zh").inputs()["data.folder"].digest()
    Image.fromarray(random_pixels(9, 40, 60)).save(folder / "0.png")
    assert Sets(data, "zh").inputs()["data.folder"].digest() != before
    assert Sets(replace(data, scenes=None), "zh").images()[0].source.fingerprint != chinese.source.fingerprint


def test_errors_of_own_cutouts_name_the_file_and_the_remedy(folder, recwarn):
    way_out = ", or train on the pictures as they are: --data.scenes None$"
    faults = {
        "the image cannot be read": ((folder / "2.png").read_bytes()[:-2000], "$"),
        "nothing in it is transparent": (png(opaque_pixels(random_pixels(3))), way_out),
        "it has no transparency": (png(random_pixels(3)[..., :3]), way_out),
    }
    for fault, (image, end) in faults.items():
        (folder / "3.png").write_bytes(image)
        said = rf"1 of 5 records cannot be used \(3.png: {fault}.*\(--data.skip-rate, now 0.01\){end}"
        with pytest.raises(UserError, match=said):
            Sets(DataConfig(folder, scenes=10), "zh")
    Sets(DataConfig(folder, scenes=10, skip_rate=0.5), "zh")
    assert "others take their places" in str(recwarn[0].message)
    for name in folder.glob("*.txt"):
        name.write_text("红灯笼", encoding="utf-8")
    with pytest.raises(UserError, match="none of its records has a caption in English"):
        Sets(DataConfig(folder, scenes=10, skip_rate=0.5), "en")
    with pytest.raises(UserError, match="0 scenes of 128 pixels"):
        Sets(DataConfig(folder, scenes=0, skip_rate=0.5), "zh")


def test_a_training_that_reads_no_captions_sees_all_scenes(folder):
    for name in folder.glob("*.txt"):
        name.write_text("a red lantern", encoding="utf-8")
    (folder / "3.txt").unlink()
    data = DataConfig(folder, scenes=30, scene_size=64, skip_rate=0.5)
    with pytest.raises(UserError, match="none of its records has a caption in Chinese"):
        Sets(data, "zh")
    (part,) = Sets(data, "zh", captions=False).images()
    assert len(part.indices) == 30
    unnamed = [part.source.words(i) for i in range(30) if part.source.words(i)["en"] is None]
    assert unnamed, "the picture without any caption is among them"


def test_a_training_of_an_autoencoder_reads_no_captions_and_wants_whole_latents(folder, tmp_path):
    """Captions in English alone do not fit the task's language, and are not what is refused."""
    for name in folder.glob("*.txt"):
        name.write_text("a red lantern", encoding="utf-8")
    vae = VAEConfig(block_out_channels=(4, 4, 4, 8), layers_per_block=1, norm_num_groups=2, sample_size=64)
    data = DataConfig(folder, scenes=10, scene_size=100)
    config = TrainConfig(VAETask(vae), tmp_path / "run", data=data, steps=1, batch_size=2)
    with pytest.raises(UserError, match=r"^data.scene_size=100: must be a multiple of 8 .*factor\), such as 104$"):
        train(config)
    with pytest.raises(UserError, match="data.scene_size=100: must be a multiple of 8"):
        Sets(data, "en").latents(Component(vae, init(vae, 0)), tmp_path)
    with pytest.raises(UserError, match="images of 60 x 40 pixels: both must be multiples of 8"):
        train(replace(config, data=DataConfig(folder)))


@pytest.fixture(scope="module")
def bundled():
    return Cutouts(open_source(EMOJI))


def test_the_bundled_set_is_cut_out(bundled):
    assert not bundled.faults and len(bundled.indices) == len(bundled.source)
    corners = np.array([[0, 0, -1, -1], [0, -1, 0, -1]])
    clear = [decode_cutout(bundled.source[i]["image"])[tuple(corners)][:, 3].max() == 0 for i in range(0, 3246, 5)]
    assert np.mean(clear) > 0.9, "few icons reach into a corner"


def test_where_no_scene_is_made_the_bundled_set_lies_on_white(bundled):
    for index in range(0, 3246, 101):
        record = bundled.record(index)
        pixels = decode_cutout(record["image"]).astype(float)
        expected = over(np.full((128, 128, 3), 255.0), pixels)
        assert np.abs(decode_image(record["image"]) - expected).max() <= 1, "PIL rounds twice"
        assert_close(scenes.compose(Scene("plain", (record,))), expected, ROUNDED)


def test_most_captions_fit_the_demos_windows(bundled):
    """24 tokens with start and end; what does not fit is cut."""
    drawn = [scenes.captions(scenes.random_scene(bundled, 0, number, images=False)) for number in range(3000)]
    for folder, language in (("chinese", "zh"), ("english", "en")):
        texts = [text[language] for text in drawn if text[language] is not None]
        lengths = np.array([len(ids) for ids in Tokenizer.from_pretrained(TOKENIZERS / folder).content(texts)])
        print(language, np.mean(lengths <= 22), lengths.max())
        assert np.mean(lengths <= 22) > 0.97
        assert len({*texts}) > 0.8 * len(texts)


def test_latents_of_scenes_are_those_of_their_pictures(tmp_path, bundled, monkeypatch, capsys):
    """Every picture is composed once, none where the latents lie there; captions are read without composing any."""
    config = VAEConfig(block_out_channels=(4, 4, 4, 4, 8), layers_per_block=1, norm_num_groups=2, sample_size=128)
    vae = Component(config, init(config, 0))
    sets = Sets(DataConfig(style="noto", scenes=20, seed=2), "en")
    composed, compose = [], scenes.compose
    monkeypatch.setattr(scenes, "compose", lambda *given: composed.append(given) or compose(*given))
    (part,) = sets.latents(vae, tmp_path)
    assert len(composed) == len(part.source)
    assert f"encoding {len(part.source)} images into latents" in capsys.readouterr().err
    (again,) = Sets(DataConfig(style="noto", scenes=20, seed=2), "en").latents(vae, tmp_path)
    assert len(composed) == len(part.source) and not capsys.readouterr().err
    np.testing.assert_array_equal(again.source[5]["moments"], part.source[5]["moments"])
    Sets(DataConfig(style="noto", scenes=20, seed=3), "en").latents(vae, tmp_path)
    assert len(composed) > len(part.source), "other scenes are composed"
    expected = record_moments(vae, [{"key": "0", "image": sets.images()[0].source[5]["image"]}])[0]
    record = part.source[5]
    np.testing.assert_allclose(record["moments"], expected, rtol=1e-4, atol=1e-4)  # fp32 in batches of other images
    assert "image" not in record and record["en"].endswith("shaded illustration")
    (with_images,) = sets.latents(vae, tmp_path, images=True)
    assert with_images.source[5]["image"] == sets.images()[0].source[5]["image"]
