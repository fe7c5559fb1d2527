"""Classes alike often in an epoch."""

from collections import Counter

import numpy as np

from bdm_jax.data.balance import repeats


def test_every_class_gets_as_many_as_the_largest():
    classes = ["a"] * 7 + ["b"] * 3 + ["c"]
    found = repeats(classes, seed=1)
    assert Counter({name: int(found[[one == name for one in classes]].sum()) for name in "abc"}) == dict.fromkeys(
        "abc", 7
    )
    assert sorted(found[7:10]) == [2, 2, 3] and (found[:7] == 1).all()
    assert (found == repeats(classes, seed=1)).all() and any((repeats(classes, s) != found).any() for s in range(2, 9))


def test_no_record_comes_too_often():
    assert repeats(["a"] * 50 + ["b"], most=10).tolist() == [1] * 50 + [10]
    assert repeats([]).shape == (0,) and np.array_equal(repeats(["a", "b"]), [1, 1])
