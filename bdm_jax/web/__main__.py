"""The page and the server: `python -m bdm_jax.web --models models`. docs/server.md says what it answers."""

import signal
import sys
import threading
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bdm_jax import command_line
from bdm_jax.app.parts import Parts
from bdm_jax.errors import UserError
from bdm_jax.web.keys import VARIABLE, given_keys
from bdm_jax.web.limits import Limits

_LOCAL, _EVERYWHERE = "127.0.0.1", "0.0.0.0"


@dataclass(frozen=True)
class WebArguments:
    """Draw in a browser, and answer clients of A1111's web API and of OpenAI's images API.

    Without --listen only this machine reaches it.
    """

    models: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """What may be picked: a folder with checkpoints, branches, loras, embeddings, controlnet, vae in it."""
    out: Path = Path("out")
    """Output folder; with several keys, each owner has a folder of its own in it."""
    host: str | None = None
    """Address to serve at; by default 127.0.0.1, with --listen 0.0.0.0."""
    listen: bool = False
    """Be reached from other machines; needs --api-key or --no-auth."""
    port: int = 7860
    """Port; 0 for any that is free."""
    api_key: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="KEY|NAME=KEY")] = ()
    """Who may ask. May be given again; also from BDM_JAX_API_KEYS, which other users of this machine do not see."""
    api_keys: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Keys from a file, one on each line."""
    no_auth: bool = False
    """Let everybody who reaches it draw."""
    host_name: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A name of this server, as behind a proxy, where there are no keys. May be given again."""
    no_page: bool = False
    """Serve the APIs alone, without the page (and without Gradio)."""
    open: bool = False
    """Open the page in the browser."""
    batch_size: int = 8
    """Pictures drawn at a time."""
    preview_every: int = 5
    """Steps between previews; 0 for none."""
    limits: Limits = Limits()
    parts: Parts = Parts()

    def address(self, keys: object) -> str:
        """Where to serve. Raises UserError for an address that others reach, without a word on who may ask."""
        host = self.host or (_EVERYWHERE if self.listen else _LOCAL)
        if host not in (_LOCAL, "localhost", "::1") and not (keys or self.no_auth):
            raise UserError(
                f"{host} is reached from other machines: give --api-key KEY (or {VARIABLE}), "
                "or --no-auth if everybody may draw"
            )
        if keys and self.no_auth:
            raise UserError("--no-auth with API keys: leave one of them out")
        if not 0 <= self.port < 2**16:
            raise UserError(f"--port {self.port} is outside 0 .. 65535")
        return host


def main(args: Sequence[str] | None = None) -> int:
    """Serve until Ctrl-C or SIGTERM, status 130; 2 for bad input."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    def command() -> None:
        asked = command_line.parse(WebArguments, args, prog="python -m bdm_jax.web")
        keys = given_keys(asked.api_key, asked.api_keys)
        host = asked.address(keys)
        asked.limits.check()
        asked.parts.check()
        try:
            from bdm_jax.web.server import Server, create_app
        except ModuleNotFoundError as error:
            raise UserError(f"{error.name} is not installed: pip install 'bdm_jax[web]'") from error
        from bdm_jax.app.service import ModelsFolder, Service
        from bdm_jax.runtime import compile_cache, processes

        processes.initialize()
        compile_cache.enable()
        service = Service(
            asked.out,
            ModelsFolder(asked.models),
            parts=asked.parts,
            batch_size=asked.batch_size,
            max_waiting=asked.limits.max_waiting,
            preview_every=asked.preview_every,
        )
        try:
            service.load()
            app = create_app(service, keys, asked.limits, hosts=asked.host_name, page=not asked.no_page)
            server = Server(app, host, asked.port, asked.limits)
            name = _LOCAL if host == _EVERYWHERE else f"[{host}]" if ":" in host else host
            shown = f"http://{name}:{server.port}"
            print(f"serving at {shown}; Ctrl-C ends it", flush=True)
            if asked.open:
                threading.Timer(1, webbrowser.open, [shown]).start()
            server.run()
        finally:
            service.close()

    return command_line.run(command)


if __name__ == "__main__":
    sys.exit(main())
