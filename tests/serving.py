"""A service's server on a free port of this machine, for as long as a block lasts."""

import contextlib
import threading
import time

from bdm_jax.web.keys import parse_keys
from bdm_jax.web.limits import Limits
from bdm_jax.web.server import Server, create_app


@contextlib.contextmanager
def running(service, keys=(), limits=None, **options):
    """A running `Server` with its `service`, and where it is as `url`; both are closed however the block ends."""
    limits = limits or Limits()
    server = Server(create_app(service, parse_keys(keys), limits, **options), "127.0.0.1", 0, limits)
    server.service, server.url = service, f"http://127.0.0.1:{server.port}"
    # A daemon: the tests end even where the server does not.
    thread = threading.Thread(target=server.run, name="server", daemon=True)
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
