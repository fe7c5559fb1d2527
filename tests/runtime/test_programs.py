"""Programs from files: the same results, nothing traced, and anything that could be wrong with a file found out."""

import os
import subprocess
import sys
import warnings
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from bdm_jax.models.unet.conditioning import Conditioning
from bdm_jax.runtime import programs
from bdm_jax.runtime.programs import Program


@dataclass(frozen=True)
class Fixed:
    factor: float = 2.0
    name: str = "one"


TRACED = []


def scaled(fixed: Fixed, cond: Conditioning, offsets: list[jax.Array], count) -> tuple[Conditioning, jax.Array | None]:
    TRACED.append(fixed)
    tokens = jax.lax.fori_loop(0, count, lambda i, x: fixed.factor * x + offsets[0][i], cond.tokens)
    return replace(cond, tokens=tokens), None


@pytest.fixture(autouse=True)
def nothing_traced():
    TRACED.clear()
    jax.clear_caches()
    yield
    programs.keep(None)


@pytest.fixture
def folder(tmp_path):
    programs.keep(tmp_path / "programs")
    return tmp_path / "programs"


@pytest.fixture
def given(rng):
    tokens, offsets = rng.standard_normal((2, 3, 4), np.float32), rng.standard_normal(5, np.float32)
    return Conditioning(jnp.asarray(tokens)), [offsets], 3


def expected(given, factor=2.0):
    (cond, [offsets], count) = given
    tokens = np.asarray(cond.tokens)
    for i in range(count):
        tokens = np.float32(factor) * tokens + offsets[i]
    return tokens


def call(given, fixed=Fixed()):
    """As a new process would: (what comes out, how often it was traced for that)."""
    before = len(TRACED)
    jax.clear_caches()
    cond, nothing = Program(scaled)(fixed, *given)
    assert isinstance(cond, Conditioning) and cond.mask is None and nothing is None
    return np.asarray(cond.tokens), len(TRACED) - before


def test_the_next_process_traces_nothing(folder, given):
    first, traced = call(given)
    np.testing.assert_allclose(first, expected(given), rtol=1e-6)
    assert traced == 1 and len(list(folder.iterdir())) == 1
    second, traced = call(given)
    assert traced == 0 and second.tobytes() == first.tobytes()
    other = given[0], given[1], 1  # a Python number is an argument like any other
    third, traced = call(other)
    assert traced == 0
    np.testing.assert_allclose(third, expected(other), rtol=1e-6)


def test_in_one_process_each_is_found_once(folder, given):
    one, (cond, [offsets], count) = Program(scaled), given
    calls = [given, (Conditioning(cond.tokens[:1]), [offsets], count), (cond, [offsets], np.int32(count))]
    for _ in range(3):
        for each in calls:
            found, _nothing = one(Fixed(), *each)
            np.testing.assert_allclose(found.tokens, expected(each), rtol=1e-6)
    assert one.count() == len(TRACED) == len(list(folder.iterdir())) == len(calls)


@pytest.mark.parametrize("change", ["fixed", "shape", "type", "structure", "weak type"])
def test_another_call_is_another_program(folder, given, change):
    call(given)
    (cond, [offsets], count), fixed = given, Fixed()
    if change == "fixed":
        fixed = Fixed(3.0)
    elif change == "shape":
        cond = Conditioning(cond.tokens[:1])
    elif change == "type":
        offsets = offsets.astype(np.float16)
    elif change == "structure":
        cond = replace(cond, image_keys={})
    else:
        count = np.int32(count)
    found, traced = call((cond, [offsets], count), fixed)
    assert traced == 1
    np.testing.assert_allclose(found, expected((cond, [offsets], count), fixed.factor), rtol=1e-3)


@pytest.mark.parametrize("change", ["sources", "flags", "settings", "versions"])
def test_other_surroundings_are_another_program(folder, given, monkeypatch, change):
    call(given)
    programs._surroundings.cache_clear()
    if change == "sources":
        real = programs.Path.read_bytes
        monkeypatch.setattr(programs.Path, "read_bytes", lambda file: real(file) + b" " * (file.name == "denoiser.py"))
    elif change == "flags":
        monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", "") + " ")
    elif change == "versions":
        monkeypatch.setattr(programs, "version", lambda name: "0")
    else:
        before = jax.config.jax_numpy_dtype_promotion
        jax.config.update("jax_numpy_dtype_promotion", "strict" if before == "standard" else "standard")
    try:
        assert call(given)[1] == 1
    finally:
        programs._surroundings.cache_clear()
        if change == "settings":
            jax.config.update("jax_numpy_dtype_promotion", before)


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "foreign"])
def test_a_damaged_file_is_made_anew(folder, given, rng, damage):
    first, _ = call(given)
    (file,) = folder.iterdir()
    content = bytearray(whole := file.read_bytes())
    if damage == "flipped":
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    file.write_bytes({"empty": b"", "cut": whole[:-1], "flipped": bytes(content), "foreign": b"\x80" * 99}[damage])
    with pytest.warns(UserWarning, match=f"{file.name}: not a program that runs here .*; recompiled"):
        second, traced = call(given)
    assert traced == 1 and second.tobytes() == first.tobytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert call(given)[1] == 0


def test_a_file_that_fails_when_it_runs_is_made_anew(folder, given, monkeypatch):
    first, _ = call(given)

    def broken(*_):
        def run(*_):
            raise jax.errors.JaxRuntimeError("a part is missing")

        return run

    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="a part is missing.*recompiled"):
        patch.setattr(programs, "_load", broken)
        assert call(given)[0].tobytes() == first.tobytes()
    assert call(given)[1] == 0


def test_where_nothing_can_be_kept_it_draws_all_the_same(tmp_path, given):
    (tmp_path / "file").touch()
    programs.keep(tmp_path / "file" / "programs")
    with pytest.warns(UserWarning, match="not kept for the next start: .*Not a directory"):
        found, _ = call(given)
    np.testing.assert_allclose(found, expected(given), rtol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of the next ones nothing is said
        call(given, Fixed(3.0))


@pytest.fixture
def jax_cache(tmp_path):
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in (*names, "jax_persistent_cache_min_entry_size_bytes")}
    compilation_cache.reset_cache()
    for name, value in zip(before, (str(tmp_path / "jax"), 0.0, -1), strict=True):
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_what_comes_from_jax_s_cache_is_not_written_once_more(jax_cache, folder, given):
    """It would lack parts, and fail when it runs."""
    first, _ = call(given)
    (file,) = folder.iterdir()
    file.unlink()
    assert call(given)[0].tobytes() == first.tobytes()
    assert not list(folder.iterdir())


def test_placed_arguments_are_another_program(folder, given):
    call(given)
    mesh = jax.make_mesh((jax.local_device_count(),), ("data",), axis_types=(AxisType.Auto,))
    cond, *others = given
    placed = jax.device_put(cond, NamedSharding(mesh, PartitionSpec()))
    found, traced = call((placed, *others))
    assert traced == 1 and found.tobytes() == call(given)[0].tobytes()
    assert call((placed, *others))[1] == 0


def test_without_a_folder_and_inside_a_trace_it_is_a_jit(tmp_path, given):
    assert call(given)[1] == call(given)[1] == 1
    programs.keep(tmp_path / "programs")
    cond, _ = jax.jit(lambda cond: Program(scaled)(Fixed(), cond, *given[1:]))(given[0])
    np.testing.assert_allclose(cond.tokens, expected(given), rtol=1e-6)
    assert not list(tmp_path.iterdir())


NO_TRACING = """
import sys, bdm_jax.sampling.denoiser, bdm_jax.latents.autoencoder, bdm_jax.text.encode
def refuse(*_): raise AssertionError("traced")
for module in (bdm_jax.sampling.denoiser, bdm_jax.latents.autoencoder, bdm_jax.text.encode): module.bind = refuse
import sample
sys.exit(sample.main())
"""


def test_a_second_sample_py_traces_no_network(tmp_path):
    """The demo at 64 x 64, drawn by a process that could not trace a network."""
    environment = {**os.environ, "BDM_JAX_CACHE": str(tmp_path / "cache")}

    def draw(start, out):
        more = ["红灯笼", "--size", "64x64", "--steps", "3", "--seed", "7", "--out", str(tmp_path / out)]
        done = subprocess.run([sys.executable, *start, *more], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return (tmp_path / out / done.stdout.strip().rpartition("/")[2]).read_bytes()

    first = draw(["sample.py"], "first")
    assert draw(["-c", NO_TRACING], "second") == first
