"""What cannot fit into memory is refused before anything is drawn; what may fit is not."""

import pytest

from bdm_jax.errors import UserError
from bdm_jax.sampling import memory
from bdm_jax.sampling.generate import generate
from bdm_jax.sampling.settings import Request, Sampling


@pytest.fixture(autouse=True)
def of_16_gb(monkeypatch):
    monkeypatch.setattr(memory, "device_memory", lambda: 16 * 10**9)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"size": (32768, 32768)},
            r"size 32768x32768, 1 at a time: the autoencoder needs more than [\d.]+ GB .* 16.0 GB: add --vae-tile 512",
        ),
        ({"size": (65536, 65536)}, "16.0 GB: take a smaller --size"),  # which tiles do not make fit
        ({"size": (65536, 65536), "vae_tile": 512}, "the autoencoder .* take a smaller --size"),
        ({"size": (16384, 16384), "hires": 4.0}, "size 65536x65536"),
    ],
)
def test_too_large_is_one_line(tiny, settings, said):
    with pytest.raises(UserError, match=said):
        generate(tiny, [Request("红灯笼")], Sampling(steps=2, **settings))


@pytest.mark.parametrize("settings", [{"size": (8192, 8192)}, {"size": (24576, 24576), "vae_tile": 512}])
def test_what_may_fit_is_not_refused(tiny, settings):
    """It would be drawn: the iterator is there, and nothing is asked of it."""
    assert iter(generate(tiny, [Request("红灯笼")], Sampling(steps=2, **settings)))
