"""The window rules against the reference implementation, written out here step by step as its description has them."""

import numpy as np
import pytest

from bdm_jax.text.windows import WindowFormat, join, windows_needed

CHINESE = dict(start=101, end=102, pad=0)
ENGLISH = dict(start=49406, end=49407, pad=49407)


def split(contents, windows, length, start, end, pad):
    return WindowFormat(length, (start,), (end,), pad).fill(contents, windows)


def cut(parts, length):
    return WindowFormat(length, (101,), (102,), 0).cut(parts)


def reference_rows(content, windows, length, start, end, pad):
    """Pad the whole row to k n + 2, cut it into overlapping windows, then mend the ends of each."""
    k = length - 2
    row = [start, *content[: windows * k]]
    row += [pad] * (windows * k + 2 - len(row))
    rows = []
    for i in range(windows):
        chunk = row[k * i : k * i + k + 2]
        chunk[0] = start
        if pad == end:
            chunk[-1] = end
        else:
            chunk[-1] = pad
            chunk[chunk.index(pad)] = end
        rows.append(chunk)
    return np.array(rows)


@pytest.mark.parametrize(("length", "language"), [(52, CHINESE), (16, CHINESE), (77, ENGLISH), (16, ENGLISH)])
def test_windows_are_the_references(length, language, rng):
    k = length - 2
    for size in {0, 1, k - 1, k, k + 1, 2 * k, 2 * k + 3, 4 * k + 1, 5 * k, 5 * k + 9}:
        content = rng.integers(1000, 2000, size).tolist()
        contents = cut([content], length)
        needed = windows_needed([len(contents)])
        assert needed == max(1, min(5, -(-size // k)))
        for windows in range(needed, 6):
            rows = split(contents, windows, length, **language)
            assert rows.dtype == np.int32
            np.testing.assert_array_equal(rows, reference_rows(content, windows, length, **language))


def test_full_window_ends_in_its_last_place_and_an_empty_one_is_an_empty_text():
    rows = split(cut([range(1000, 1050)], 52), 2, 52, **CHINESE)
    assert rows[0, 0] == 101 and rows[0, -1] == 102 and 0 not in rows[0]
    assert rows[1].tolist() == [101, 102] + [0] * 50


@pytest.mark.parametrize("length", [16, 52, 77])
@pytest.mark.parametrize("windows", [1, 2, 3, 4, 5])
def test_joined_lengths(length, windows):
    states = np.zeros((2, windows, length, 3), np.float32)
    assert join(states).shape == (2, windows * (length - 2) + 2, 3)
    table = {52: [52, 102, 152, 202, 252], 77: [77, 152, 227, 302, 377]}
    if length in table:
        assert join(states).shape[1] == table[length][windows - 1]


def test_join_drops_the_ends_between_windows():
    states = np.arange(3 * 5, dtype=np.float32).reshape(1, 3, 5, 1)
    assert join(states)[0, :, 0].tolist() == [0, 1, 2, 3, 6, 7, 8, 11, 12, 13, 14]
    assert join(states[:, :1])[0, :, 0].tolist() == [0, 1, 2, 3, 4]


def test_every_part_begins_a_window_and_an_empty_one_takes_none():
    assert cut([[1, 2], [], [3, 4, 5, 6], []], 5) == [[1, 2], [3, 4, 5], [6]]
    assert cut([[1, 2, 3], [4]], 5) == [[1, 2, 3], [4]]
    assert cut([], 5) == cut([[]], 5) == []
    rows = split(cut([[1, 2], [3]], 6), 3, 6, **CHINESE)
    assert rows.tolist() == [[101, 1, 2, 102, 0, 0], [101, 3, 102, 0, 0, 0], [101, 102, 0, 0, 0, 0]]


def test_the_longest_decides_and_five_are_the_most():
    assert windows_needed([]) == windows_needed([0]) == 1
    assert windows_needed([1, 2, 1]) == 2
    assert windows_needed([99]) == 5
