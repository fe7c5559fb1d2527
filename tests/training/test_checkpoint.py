"""What comes back from a checkpoint folder, whatever has happened to it."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bdm_jax.errors import UserError
from bdm_jax.runtime.sharding import make_mesh
from bdm_jax.training import checkpoint, digests
from bdm_jax.training.checkpoint import Checkpoints
from bdm_jax.training.state import abstract_state, make_state

STEPS = (2, 4, 6)
TRIALS = 200
OPTIMIZER = optax.adam(1e-3)


def params(rng):
    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    return {"net": {"conv.kernel": draw(3, 3, 4, 8), "bias": draw(8)}, "text": {"word.embedding": draw(20, 16)}}


def equal(ours, reference):
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True)
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh()


@pytest.fixture(scope="module")
def written(tmp_path_factory, mesh):
    """A folder with three checkpoints, and the states in it by step."""
    folder, states = tmp_path_factory.mktemp("checkpoints") / "good", {}
    checkpoints = Checkpoints(folder, keep=3, config="c0")
    for step in STEPS:
        states[step] = make_state(params(np.random.default_rng(step)), OPTIMIZER, mesh)
        checkpoints.save(step, states[step], mesh, {"at": step})
    checkpoints.close()
    return folder, states


def restore(folder, mesh, like=None, config="c0"):
    like = like or abstract_state(params(np.random.default_rng(0)), OPTIMIZER)
    checkpoints = Checkpoints(folder, keep=3, config=config)
    try:
        return checkpoints.restore(like, mesh)
    finally:
        checkpoints.close()


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def damage(folder: Path, step: int, rng) -> str:
    """Do something bad to one step; what it was."""
    target = folder / str(step)
    victim = files(target)[rng.integers(len(files(target)))]
    content = bytearray(victim.read_bytes())
    kind = rng.choice(
        ["flip", "flip", "flip", "truncate", "delete", "overwrite", "empty", "empty state", "gone", "swap"]
    )
    if kind == "flip" and content:
        bit = int(rng.integers(8 * len(content)))
        content[bit // 8] ^= 1 << bit % 8
        victim.write_bytes(content)
    elif kind == "truncate":
        victim.write_bytes(content[: rng.integers(max(1, len(content)))])
    elif kind == "delete":
        victim.unlink()
    elif kind == "overwrite":
        victim.write_bytes(rng.bytes(len(content)))
    elif kind in ("empty", "empty state"):
        inside = target if kind == "empty" else target / "state"
        shutil.rmtree(inside)
        inside.mkdir()
    elif kind == "gone":
        shutil.rmtree(target)
    elif kind == "swap":  # the whole state of another step under this one's sidecar
        other = folder / str(STEPS[0] if step != STEPS[0] else STEPS[1])
        if (other / "state").is_dir():
            shutil.rmtree(target / "state")
            shutil.copytree(other / "state", target / "state")
    return f"{step}: {kind} {victim.relative_to(target)}"


def leave_over(folder: Path, rng) -> str:
    """Add what an interrupted process may leave; damages nothing."""
    kind = rng.choice(["saving", "removing", "orbax", "number", "none"])
    if kind in ("saving", "removing"):
        shutil.copytree(folder / "2", folder / f".{kind}-8", dirs_exist_ok=True)
    elif kind == "orbax":
        (folder / ".saving-8" / "state.orbax-checkpoint-tmp-17").mkdir(parents=True)
    elif kind == "number":
        (folder / "8").mkdir()
    return f"left over: {kind}"


def test_random_corruptions_never_restore_wrongly_or_start_afresh(written, mesh, tmp_path, rng, capsys):
    """Each ends in a state that was saved, at least as new as the newest untouched one, or in a refusal where every
    step was damaged. (A flip may leave a sidecar's meaning alone: then the damaged step itself comes back, exact.)
    """
    good, states = written
    refused = newest = older = 0
    for trial in range(TRIALS):
        folder = tmp_path / str(trial)
        shutil.copytree(good, folder)
        what = [leave_over(folder, rng)]
        hurt = rng.permutation(STEPS)[: rng.integers(1, 4)] if trial % 2 else [STEPS[-1]]
        what += [damage(folder, int(step), rng) for step in hurt]
        untouched = [step for step in STEPS if step not in hurt]
        try:
            found = restore(folder, mesh)
        except UserError as error:
            assert not untouched, (what, str(error))
            assert "no checkpoint can be used" in str(error) and "\n" not in str(error)
            refused += 1
            continue
        finally:
            shutil.rmtree(folder)
        assert found is not None, what
        state, notes = found
        assert equal(state, states[notes["at"]]), what
        assert notes["at"] >= max(untouched, default=0), what
        newest, older = newest + (notes["at"] == STEPS[-1]), older + (notes["at"] < STEPS[-1])
    told = capsys.readouterr().err
    print(f"{TRIALS} corruptions: {newest} gave the newest step, {older} an older one, {refused} were refused")
    assert older > TRIALS / 3 and told.count("\n") >= older


@pytest.mark.parametrize(
    "part", ["params/net/conv.kernel", "ema/net/bias", "optimizer/0/nu/text/word.embedding", "step"]
)
def test_a_flipped_bit_in_any_array_changes_its_digest_on_any_mesh(written, mesh, part, rng):
    _, states = written
    before = digests.finish(digests.begin(states[6], mesh))
    array = np.array(digests.leaves(states[6])[part])
    bits = array.reshape(-1).view(np.uint32)
    for _ in range(50):
        bit = int(rng.integers(32 * bits.size))
        bits[bit // 32] ^= np.uint32(1 << bit % 32)
        changed = digests.finish(digests.begin({part: jnp.asarray(array)}, mesh))[part]
        bits[bit // 32] ^= np.uint32(1 << bit % 32)
        assert changed != before[part]
    assert digests.finish(digests.begin({part: jnp.asarray(array)}, mesh))[part] == before[part]


def test_the_digest_is_the_formula_in_its_docstring(mesh, rng):
    """Against NumPy, with a 16-bit type and an odd shape."""

    def mix(x):
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
        x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
        return x ^ (x >> np.uint32(16))

    array = rng.standard_normal((3, 5, 7)).astype(jnp.bfloat16)
    bits, place = array.reshape(-1).view(np.uint16).astype(np.uint32), np.arange(105, dtype=np.uint32)
    words = [np.sum(mix(bits ^ mix(place * 2 + 1 + lane)), dtype=np.uint32) for lane in digests._LANES]
    expected = "".join(f"{word:08x}" for word in words)
    assert digests.finish(digests.begin({"x": jnp.asarray(array)}, mesh))["x"] == expected


def test_the_warning_names_step_array_and_cause(written, mesh, tmp_path, capsys, monkeypatch):
    """Values that changed between device and disk: Orbax's own files are whole, only the digest can tell."""
    _, states = written
    folder = tmp_path / "run"
    checkpoints = Checkpoints(folder, keep=3, config="c0")
    checkpoints.save(2, states[2], mesh, {"at": 2})
    checkpoints.wait()
    begin = digests.begin
    other = {**states[4].params, "net": {**states[4].params["net"], "bias": states[4].params["net"]["bias"] + 1}}
    monkeypatch.setattr(
        checkpoint.digests, "begin", lambda state, mesh: begin(type(state)(**{**vars(state), "params": other}), mesh)
    )
    checkpoints.save(4, states[4], mesh, {"at": 4})
    checkpoints.close()
    monkeypatch.undo()
    assert restore(folder, mesh)[1] == {"at": 2}
    lines = capsys.readouterr().err.splitlines()
    assert "step 4 is damaged (params/net/bias has other values" in lines[0] and "going on from step 2" in lines[1]


def test_a_fresh_start_only_where_there_never_was_a_checkpoint(written, mesh, tmp_path):
    """Also when every folder is gone: newest.json remembers. What a first save left unfinished is no checkpoint."""
    assert restore(tmp_path / "new", mesh) is None
    (tmp_path / "killed" / ".saving-2" / "state.orbax-checkpoint-tmp-1").mkdir(parents=True)
    assert restore(tmp_path / "killed", mesh) is None
    for step in (None, 6):
        folder = tmp_path / f"gone-{step}"
        shutil.copytree(written[0], folder)
        for name in STEPS:
            shutil.rmtree(folder / str(name))
        if step is None:
            (folder / "newest.json").write_text("{")
        with pytest.raises(UserError, match="nothing is trained from scratch"):
            restore(folder, mesh)


def test_another_config_type_or_shape_is_refused_by_name(written, mesh):
    folder, _ = written
    with pytest.raises(UserError, match=r"another config \(c0, here c1\)"):
        restore(folder, mesh, config="c1")
    own = params(np.random.default_rng(0))
    half = {**own, "text": {"word.embedding": own["text"]["word.embedding"].astype(jnp.bfloat16)}}
    with pytest.raises(UserError, match=r"ema/text/word.embedding is \['float32', \[20, 16\]\] there, \['bfloat16'"):
        restore(folder, mesh, like=abstract_state(half, OPTIMIZER))
    more = {**own, "more": {"bias": jnp.zeros(3)}}
    with pytest.raises(UserError, match=r"ema/more/bias is nothing there"):
        restore(folder, mesh, like=abstract_state(more, OPTIMIZER))


def test_old_ones_go_and_a_damaged_newer_one_is_no_reason_to(written, mesh, tmp_path):
    """keep=1: after falling back from a damaged 6 to 4, the save of 5 leaves 5, and 6 is overwritten when it comes."""
    folder, states = tmp_path / "run", written[1]
    shutil.copytree(written[0], folder)
    shutil.rmtree(folder / "6" / "state" / "d")
    checkpoints = Checkpoints(folder, keep=1, config="c0")
    assert checkpoints.restore(abstract_state(params(np.random.default_rng(0)), OPTIMIZER), mesh)[1] == {"at": 4}
    checkpoints.save(5, states[4], mesh, {"at": 5})
    checkpoints.wait()
    assert sorted(path.name for path in folder.iterdir()) == ["5", "6", "newest.json"]
    checkpoints.save(6, states[6], mesh, {"at": 6})
    checkpoints.close()
    assert sorted(path.name for path in folder.iterdir()) == ["6", "newest.json"]
    assert equal(restore(folder, mesh)[0], states[6])
    assert json.loads((folder / "newest.json").read_text()) == {"step": 6}
