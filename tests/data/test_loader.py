"""500 faults among good records; the same order on any number of hosts; buckets; weights."""

import json
import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from grain.experimental import index_shuffle

from bdm_jax.data import captions, order, records
from bdm_jax.data.loader import MixturePart, mix_loader
from bdm_jax.data.source import Skips
from bdm_jax.errors import BadRecord, UserError
from bdm_jax.images.decode import decode_image

GOOD, BAD = 500, 500


def make_loader(source, indices, *arguments, **options):
    """Of one part."""
    return mix_loader([MixturePart(source, indices)], *arguments, **options)


class Some:
    """Numbers, some of which cannot be used."""

    def __init__(self, count, bad=(), offset=0):
        self.count, self.bad, self.offset = count, set(bad), offset

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.bad:
            raise BadRecord(f"record {index}", "broken", "by the test")
        return {"number": index + self.offset}


def keep(record, rng):
    bucket = record.get("bucket", (0, 0))
    return {"number": np.int64(record["number"]), "noise": rng.random(), "bucket": np.array(bucket)}


def take(loader, count):
    return [next(loader) for _ in range(count)]


def joined(hosts):
    """Batches of every host -> the global batches: host i has samples i, i + n, ..."""
    return [
        {key: np.stack([part[key] for part in parts], 1).reshape(-1, *parts[0][key].shape[1:]) for key in parts[0]}
        for parts in zip(*hosts, strict=True)
    ]


def assert_equal(a, b):
    for x, y in zip(a, b, strict=True):
        assert all(np.array_equal(x[key], y[key]) for key in x)


def several():
    """Two sets with faults in two buckets."""
    first, second = Some(40, bad=range(0, 40, 7)), Some(30, bad=[3, 4], offset=100)
    wide, tall = (32, 64), (64, 32)
    return [
        MixturePart(first, range(25), 2.0, wide),
        MixturePart(first, np.arange(25, 40, dtype=np.uint32), 1.0, tall),
        MixturePart(second, range(30), 3.0, wide),
    ]


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_order_is_that_of_one_host_also_after_a_restart_on_another_number(hosts):
    def loaders(count, state=None):
        made = [
            mix_loader(several(), keep, 8, 5, process_index=i, process_count=count, skips=Skips(1.0))
            for i in range(count)
        ]
        for loader in made if state else ():
            loader.set_state(state)
        return made

    whole = take(loaders(1)[0], 30)
    begun = loaders(hosts)
    first = joined([take(loader, 13) for loader in begun])
    state = json.loads(json.dumps(begun[0].get_state()))
    assert all(loader.get_state() == begun[0].get_state() for loader in begun)
    for others in (1, 2, 4):
        rest = joined([take(loader, 17) for loader in loaders(others, state)])
        assert_equal(whole, first + rest)


def test_a_position_of_other_data_is_refused_by_both_values():
    state = make_loader(Some(50), range(50), keep, 8, 1, start_step=6).get_state()
    with pytest.raises(UserError, match="records was .50., is .51."):
        make_loader(Some(51), range(51), keep, 8, 1).set_state(state)
    with pytest.raises(UserError, match="seed was 1, is 2"):
        make_loader(Some(50), range(50), keep, 8, 2).set_state(state)
    with pytest.raises(UserError, match="batch_size was 8, is 10"):
        make_loader(Some(50), range(50), keep, 10, 1).set_state(state)
    mixed = mix_loader(several(), keep, 8, 1, start_step=6)
    with pytest.raises(UserError, match="batch_size was 8, is 16: .* buckets"):
        mix_loader(several(), keep, 16, 1).set_state(mixed.get_state())


def test_a_position_is_converted_to_another_batch_size():
    whole = take(make_loader(Some(50), range(50), keep, 4, 1), 20)
    other = make_loader(Some(50), range(50), keep, 16, 1)
    other.set_state(make_loader(Some(50), range(50), keep, 4, 1, start_step=8).get_state())
    numbers = np.concatenate([batch["number"] for batch in take(other, 3)])
    assert np.array_equal(numbers, np.concatenate([batch["number"] for batch in whole[8:]]))


def test_a_batch_is_of_one_bucket_and_every_sample_comes_once_per_epoch():
    first, second = Some(64), Some(32, offset=100)
    parts = [MixturePart(first, range(64), bucket=(8, 16)), MixturePart(second, range(32), bucket=(16, 8))]
    batches = take(mix_loader(parts, keep, 8, 3), 24)  # two epochs of 12
    for batch in batches:
        assert len(np.unique(batch["bucket"], axis=0)) == 1
        assert ((batch["number"] >= 100) == (batch["bucket"][:, 0] == 16)).all()
    assert set(Counter(np.concatenate([b["number"] for b in batches]).tolist()).values()) == {2}
    assert sum(batch["bucket"][0, 0] == 16 for batch in batches) == 8


@pytest.mark.parametrize("weights", [(1, 1, 1), (0.7, 0.2, 0.1), (5, 1, 30)])
def test_sets_are_mixed_by_weight(weights):
    sources = [Some(400), Some(30, offset=1000), Some(90, offset=2000)]
    parts = [MixturePart(s, range(len(s)), w) for s, w in zip(sources, weights, strict=True)]
    numbers = np.concatenate([batch["number"] for batch in take(mix_loader(parts, keep, 50, 0), 60)])
    found = np.bincount(numbers // 1000, minlength=3) / len(numbers)
    assert np.abs(found - np.array(weights) / sum(weights)).max() < 0.006  # Grain rounds weights to about a hundredth
    ten = Counter(numbers[numbers // 1000 == 1].tolist())
    assert max(ten.values()) - min(ten.get(1000 + i, 0) for i in range(30)) <= 1


def test_weights_must_be_there_for_all_or_none():
    for weights in ((1.0, None), (0.0, 1.0), (-1.0, 1.0), (float("nan"), 1.0)):
        with pytest.raises(UserError, match="weights"):
            mix_loader([MixturePart(Some(5), range(5), weight) for weight in weights], keep, 2, 0)


def test_only_the_faulty_samples_change():
    sound = take(make_loader(Some(100), range(100), keep, 10, 4), 10)
    loader = make_loader(Some(100, bad=[17, 50]), range(100), keep, 10, 4)
    mended = take(loader, 10)
    assert loader.skips.names["broken"][:1] in (["record 17"], ["record 50"])
    before, after = (np.concatenate([batch["number"] for batch in batches]) for batches in (sound, mended))
    changed = np.flatnonzero(before != after)
    assert sorted(before[changed]) == [17, 50] and not {17, 50} & set(after)


def test_too_many_faults_end_the_run_with_one_line():
    loader = make_loader(Some(3000, bad=range(0, 3000, 20)), range(3000), keep, 10, 4)
    with pytest.raises(UserError, match=r"more than 1.00% of the records cannot be used: \d+ of \d+ left out") as error:
        take(loader, 300)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="100 records in a row|cannot be used"):
        next(make_loader(Some(9, bad=range(9)), range(9), keep, 3, 0, skips=Skips(1.0)))


def test_storage_that_fails_is_no_fault_of_a_record():
    class Broken(Some):
        def __getitem__(self, index):
            raise OSError("the network is gone")

    with pytest.raises(OSError, match="network"):
        next(make_loader(Broken(9), range(9), keep, 3, 0))


def test_500_hostile_records_are_counted_and_no_good_one_is_lost(tmp_path, faults, picture, write_tar, write_folder):
    """Pictures of every fault and broken texts, in tar shards and in a folder, among as many good ones."""
    kinds = [(cause, data) for cause, examples in faults.items() for data in examples]
    texts = [("invalid metadata", {"txt": b"\xff\xfe\xff"}), ("invalid metadata", {"json": b"[1, 2"})]
    texts += [("no zh caption", {"txt": b"only English"}), ("no zh caption", {})]
    expected, tar_samples, rows = Counter(), [], []
    for i in range(BAD // 2):
        if i % 5 == 0:
            cause, files = texts[i // 5 % len(texts)]
            sample = {"png": picture(i), **files}
        else:
            cause, data = kinds[i % len(kinds)]
            sample = {"png": data, "txt": "坏".encode()}
        expected[cause] += 1
        tar_samples += [sample, {"jpg": picture(i, kind="JPEG"), "txt": f"好{i}".encode()}]
        cause, data = kinds[(3 * i) % len(kinds)]
        expected[cause] += 1
        rows += [{"image": data, "text": "坏"}, {"image": picture(i), "text": f"很好{i}"}]
    for start in range(0, len(tar_samples), 100):
        write_tar(tmp_path / f"s-{start:04d}.tar", tar_samples[start : start + 100], first=start)
    folder = write_folder(tmp_path / "folder", rows)
    sources = [records.open_source(tmp_path / "s-*.tar"), records.open_source(folder)]
    assert list(map(len, sources)) == [GOOD, GOOD] and sum(expected.values()) == BAD

    def sample(record, rng):
        pixels = decode_image(record["image"], name=record["key"], strict=True)
        text = captions.caption(record, "zh", rng)
        return {"pixels": pixels.mean(), "text": np.array(text, dtype="U9")}

    skips = Skips(1.0, tmp_path / "left_out.jsonl")
    loader = mix_loader(
        [MixturePart(s, range(GOOD)) for s in sources], sample, 20, 0, skips=skips, threads=1, prefetch=1
    )
    steps = (GOOD + BAD) // 20
    seen = {str(text) for batch in take(loader, steps) for text in batch["text"]}
    assert seen == {f"好{i}" for i in range(250)} | {f"很好{i}" for i in range(250)}
    assert set(skips.counts) == set(expected) and all(skips.counts[cause] >= expected[cause] for cause in expected)
    with skips._lock:  # the loader reads on
        lines, counts = skips.log.read_text(encoding="utf-8").splitlines(), dict(skips.counts)
    lines = [json.loads(line) for line in lines]
    assert Counter(line["cause"] for line in lines) == counts
    distinct = Counter(cause for _, cause in {(line["record"], line["cause"]) for line in lines})
    assert distinct == expected


def test_memory_holds_a_few_batches_however_many_are_read():
    def large(record, rng):
        return {"pixels": np.full((256, 256, 3), record["number"] % 256, np.uint8)}

    loader = make_loader(Some(100), range(100), large, 8, 0, threads=2, prefetch=16)
    tracemalloc.start()
    for _ in range(100):
        next(loader)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 8 * 256 * 256 * 3  # 2 are ready, 2 in the making, each twice while it is stacked


def test_a_billion_records_cost_nothing_to_shuffle():
    class Endless(Some):
        def __getitem__(self, index):
            return {"number": index}

    begun = time.monotonic()
    parts = [MixturePart(Endless(10**9), range(10**9), 1.0), MixturePart(Endless(4 * 10**9), range(4 * 10**9), 1.0)]
    loader = mix_loader(parts, keep, 64, 0, start_step=10**7)
    numbers = np.concatenate([batch["number"] for batch in take(loader, 4)])
    assert len(set(numbers.tolist())) == len(numbers) and numbers.max() > 2**31
    assert time.monotonic() - begun < 10
    with pytest.raises(UserError, match="split it"):
        mix_loader([MixturePart(Endless(2**33), range(2**33))], keep, 64, 0)


@pytest.mark.parametrize("weights", [(None,) * 3, (3.0, 1.0, 0.017)])
def test_without_grains_layers_the_batches_are_the_same(weights):
    """Order, generators and replacements; from the start and in the middle, for one process of one and of two."""

    def draws(record, rng):
        if record["number"] % 17 == 5:
            rng.random()
            raise BadRecord(str(record["number"]), "bad", "drawn before it was seen")
        return {"number": record["number"], "drawn": np.array([rng.random(), rng.integers(7), *rng.permutation(3)])}

    parts = [
        MixturePart(Some(count), indices, weight)
        for count, indices, weight in zip((50, 40, 7), (range(50), np.arange(9, 40), range(7)), weights, strict=True)
    ]
    for start, index, count in ((0, 0, 1), (1000, 1, 2)):
        options = {"start_step": start, "process_index": index, "process_count": count}
        loaders = [mix_loader(parts, draws, 8, 5, **options, skips=Skips(1.0), light=light) for light in (False, True)]
        for _ in range(60):
            grains, ours = map(next, loaders)
            np.testing.assert_array_equal(grains["number"], ours["number"])
            np.testing.assert_array_equal(grains["drawn"], ours["drawn"])
        assert loaders[0].get_state() == loaders[1].get_state()


@pytest.mark.parametrize("length", [1, 2, 7, 300, 2**16 - 1, 2**16])
def test_a_whole_epoch_is_shuffled_at_once(length):
    for seed in (0, 5, 2**32 - 1):
        found = order.shuffled(length, seed)
        some = np.unique(np.linspace(0, length - 1, 20).astype(int)).tolist()
        expected = [index_shuffle(i, max_index=length - 1, seed=seed, rounds=4) for i in some]
        assert [found[i] for i in some] == expected and sorted(found) == list(range(length))


def test_another_grain_s_order_is_not_guessed(monkeypatch):
    """Where what is computed is not what Grain gives, Grain gives it."""
    expected = take(mix_loader([MixturePart(Some(50), range(50))], keep, 8, 5), 3)
    monkeypatch.setattr("bdm_jax.data.order._ROUNDS", 6)
    found = take(mix_loader([MixturePart(Some(50), range(50))], keep, 8, 5, light=True), 3)
    np.testing.assert_array_equal([batch["number"] for batch in found], [batch["number"] for batch in expected])


def test_several_captions_each_get_their_turn():
    record = {"key": "x", "captions": ["红灯笼", "a red lantern", "一盏灯", "赤い灯りです"]}
    drawn = Counter(captions.caption(record, "zh", np.random.default_rng([1, i])) for i in range(400))
    assert set(drawn) == {"红灯笼", "一盏灯"} and min(drawn.values()) > 150
    assert captions.name(record, "zh") == "红灯笼" and captions.name(record, "en") == "a red lantern"
    with pytest.raises(BadRecord, match="x: none of 1 captions"):
        captions.caption({"key": "x", "captions": ["한국어 文字"]}, "zh", np.random.default_rng(0))
