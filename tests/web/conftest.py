"""A server on a free port of this machine, drawing with the tiny bridge."""

import contextlib

import pytest
from serving import running

from bdm_jax.app.parts import Parts
from bdm_jax.app.service import ModelsFolder, Service


@pytest.fixture(scope="module")
def serve(tiny_folder, tmp_path_factory):
    """A context: a running `Server`; with its `service`, and where it is as `url`."""

    @contextlib.contextmanager
    def serving(keys=(), limits=None, models=None, **options):
        out = tmp_path_factory.mktemp("out")
        service = Service(out, ModelsFolder(models), parts=Parts(model=tiny_folder), **{"batch_size": 4, **options})
        with running(service, keys, limits, page=False) as server:
            yield server

    return serving
