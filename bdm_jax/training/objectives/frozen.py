"""Networks that a training only uses: loaded without filling one device, in the type that is computed in."""

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from bdm_jax.models.unet.conditioning import Conditioning
from bdm_jax.systems.components import Component
from bdm_jax.systems.pipeline import BridgePipeline
from bdm_jax.text import readers


@contextlib.contextmanager
def on_host() -> Iterator[None]:
    """Arrays made in here lie in the host's memory, where several devices share what comes of them: the loop places
    every one's part on it. With one device they are made there.
    """
    with contextlib.ExitStack() as stack:
        if jax.device_count() > 1:
            with contextlib.suppress(RuntimeError):  # JAX_PLATFORMS may leave the host out
                stack.enter_context(jax.default_device(jax.local_devices(backend="cpu")[0]))
        yield


def as_dtype(component: Component, dtype: jnp.dtype) -> Component:
    """The network in another floating-point type."""
    return component._replace(params={path: jnp.asarray(value, dtype) for path, value in component.params.items()})


def empty_prompt(pipeline: BridgePipeline, dtype: jnp.dtype) -> Conditioning:
    """What the backbone reads of the prompt "": states (1,S,D) and, where it reads one, the pooled text (1,P)."""
    reader = pipeline.readers["backbone"]
    text = readers.encode(reader, pipeline.parts, readers.read(reader, pipeline.parts, [""]))
    return jax.tree.map(lambda states: states.astype(dtype), text)
