"""--profile-steps: a trace that TensorBoard and Perfetto open, of the steps that were asked for."""

import gzip
import json

import pytest
import toy

from bdm_jax.errors import UserError
from bdm_jax.training.config import check
from bdm_jax.training.loop import train
from bdm_jax.training.profiling import parse_steps


def test_a_profile_lies_in_the_run_folder(tmp_path, capsys):
    assert train(toy.config(tmp_path, profile_steps="4:5"))
    err = capsys.readouterr().err
    assert f"profile of steps 4 to 5: tensorboard --logdir {tmp_path / 'profile'}" in err
    (planes,) = (tmp_path / "profile" / "plugins" / "profile").glob("*/*.xplane.pb")
    assert planes.stat().st_size > 1000
    (trace,) = (tmp_path / "profile").rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert any(event.get("name") == "PjitFunction(step)" for event in events)
    assert train(toy.config(tmp_path, profile_steps="4:5"))  # resumed after them
    assert "note: step 10 is done already: nothing of 4:5 is profiled" in capsys.readouterr().err


def test_a_session_that_ends_within_them_writes_what_it_has(tmp_path, capsys):
    assert not train(toy.config(tmp_path, profile_steps="2:10", minutes=1e-9))
    assert "profile of steps 2 to 3" in capsys.readouterr().err
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ten", "profile_steps=ten: give the first and the last step, as --profile-steps 10:15"),
        ("0:5", "profile_steps=0:5: the first step must be at least 1, the last at most steps=10"),
        ("5:4", "must be at least 1"),
        ("9:11", "the last at most steps=10"),
        ("1:-3", "give the first"),
    ],
)
def test_what_are_no_steps_is_refused_before_anything_is_loaded(text, message, tmp_path):
    with pytest.raises(UserError, match=message):
        check(toy.config(tmp_path, profile_steps=text))
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="more than 100 steps"):
        parse_steps("1:101", 1000)
