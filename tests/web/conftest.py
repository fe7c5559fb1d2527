"""A server on a free port of this machine, drawing with the tiny bridge."""

import contextlib
import threading
import time

import pytest

from bdm_jax.app.parts import Parts
from bdm_jax.app.service import ModelsFolder, Service
from bdm_jax.web.keys import parse_keys
from bdm_jax.web.limits import Limits
from bdm_jax.web.server import Server, create_app


@pytest.fixture(scope="module")
def serve(tiny_folder, tmp_path_factory):
    """A context: a running `Server`; with its `service`, and where it is as `url`."""

    @contextlib.contextmanager
    def serving(keys=(), limits=None, models=None, **options):
        out = tmp_path_factory.mktemp("out")
        service = Service(out, ModelsFolder(models), parts=Parts(model=tiny_folder), **{"batch_size": 4, **options})
        limits = limits or Limits()
        server = Server(create_app(service, parse_keys(keys), limits, page=False), "127.0.0.1", 0, limits)
        server.service, server.url = service, f"http://127.0.0.1:{server.port}"
        thread = threading.Thread(target=server.run, name="server")
        thread.start()
        try:
            while not server.started and thread.is_alive():
                time.sleep(0.01)
            yield server
        finally:
            server.should_exit = True
            thread.join(60)
            service.close()
        assert not thread.is_alive()

    return serving
