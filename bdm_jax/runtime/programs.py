"""Compiled programs as files: the next process that asks for one neither traces nor compiles it.

JAX's own cache (`compile_cache`) keeps what the compiler made, but each start traces and lowers every program again to
find it there. A `program` is looked up by what it is called with instead. Its file's name is a digest of everything
that the machine code depends on: this package's sources, versions, machine, flags, fixed arguments, shapes. Where the
file is not there but JAX's cache has the program, as after a change of the sources, that one is taken and no file left.
"""

import contextlib
import functools
import hashlib
import os
import pickle
import platform
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

from bdm_jax.errors import FileError
from bdm_jax.paths import atomic_file

_folder: Path | None = None
_write = True
_LIBRARY = Path(__file__).resolve().parent.parent  # every source that a program may be traced from
_SETTINGS = ("jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl", "jax_numpy_dtype_promotion")
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_CPU_OPTIONS = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def keep(folder: Path | None, write: bool = True) -> None:
    """From now on, look for programs in this folder and, with `write`, leave new ones there; None ends it.

    It must be as trustworthy as the programs of this machine: what lies in it is run. One process of a job of several
    keeps to itself.
    """
    global _folder, _write
    _folder, _write = folder if jax.process_count() == 1 else None, write


def program(function: Callable) -> "Program":
    """A pure function (fixed, *arrays) as `jax.jit(function, static_argnums=0)`, kept as `keep` says.

    `fixed` is frozen, and its repr has all of it. On a CPU its steps run in the order that takes the least memory: in
    the compiler's usual order, the weights of all layers of a text encoder in int8 were made numbers before the first.
    """
    return Program(function)


class Program:
    """Called like its function, by position."""

    def __init__(self, function: Callable):
        functools.update_wrapper(self, function)
        self._within = jax.jit(function, static_argnums=0)  # another program: it has no options of its own
        self._ready: dict[tuple, Callable] = {}
        self._latest: dict[tuple, Callable] = {}

    @functools.cached_property
    def jitted(self) -> Callable:
        """The function for JAX to compile, with the options of the device, which is known when one is asked."""
        options = _CPU_OPTIONS if jax.default_backend() == "cpu" else None
        return jax.jit(self.__wrapped__, static_argnums=0, compiler_options=options)

    def __call__(self, fixed, *arguments):
        leaves, tree = jax.tree.flatten(arguments)
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            return self._within(fixed, *arguments)
        if _folder is None:
            return self.jitted(fixed, *arguments)
        # The folder too: who changes it, as tests do, does not want what lay in another.
        group = _folder, fixed, tree
        if latest := self._latest.get(group):  # to look at a thousand arrays takes longer than to try
            with contextlib.suppress(TypeError, ValueError):  # of another shape, or elsewhere
                return latest(*arguments)
        key = *group, tuple(map(_kind, leaves))
        if ready := self._ready.get(key):
            result = ready(*arguments)
        else:
            ready, result = self._first(key[1:], fixed, arguments)
        self._ready[key] = self._latest[group] = ready
        return result

    def count(self) -> int:
        """How many there are in memory, one for each kind of call."""
        return len(self._ready) + self.jitted._cache_size()

    def _first(self, key: tuple, fixed, arguments) -> tuple[Callable, Any]:
        """The program and what comes out, from its file or compiled."""
        everything = repr((_surroundings(), self.__module__, self.__qualname__, key))
        file = _folder / hashlib.sha256(everything.encode()).hexdigest()
        try:
            loaded = _load(file.read_bytes(), arguments)
            return loaded, jax.block_until_ready(loaded(*arguments))
        except (FileNotFoundError, NotADirectoryError):
            pass
        except Exception as error:  # whatever is wrong with a kept file, it can be recompiled
            warnings.warn(f"{file}: not a program that runs here ({error}); recompiled", stacklevel=3)
        lowered, before = self.jitted.lower(fixed, *arguments), _hits[0]
        compiled = lowered.compile()
        if _write and _hits[0] == before:
            _save(file, compiled)
        return compiled, compiled(*arguments)


_hits = [0]  # of JAX's own cache, which leaves programs that run but cannot be written once more: parts are missing


def _count(event: str, **_) -> None:
    _hits[0] += event == "/jax/compilation_cache/cache_hits"


def compilations() -> tuple[int, float]:
    """How many programs this process has compiled, or read from JAX's own cache, and the seconds of that."""
    return _compiled[0], _compiled[1]


_compiled = [0, 0.0]


def _count_compiled(event: str, seconds: float, **_) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compiled[0] += 1
        _compiled[1] += seconds


jax.monitoring.register_event_listener(_count)
jax.monitoring.register_event_duration_secs_listener(_count_compiled)


def _save(file: Path, compiled: jax.stages.Compiled) -> None:
    try:
        content = _dump(compiled)
    except ValueError:  # a platform whose programs cannot be taken out of memory
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as out:
            out.write(content)
    except (FileError, OSError) as error:
        global _write
        _write = False  # a full disk has no room for the next one either: one note
        warnings.warn(f"compiled programs are not kept for the next start: {error}", stacklevel=4)


def _dump(compiled: jax.stages.Compiled) -> bytes:
    """Digest, then the program and its result's structure."""
    code, _, structure = serialize_executable.serialize(compiled)
    skeleton = jax.tree.unflatten(structure, range(structure.num_leaves))
    body = pickle.dumps((code, skeleton))
    return hashlib.sha256(body).digest() + body


def _load(content: bytes, arguments: tuple) -> jax.stages.Compiled:
    digest, body = content[:32], content[32:]
    if hashlib.sha256(body).digest() != digest:
        raise ValueError("damaged")
    code, skeleton = pickle.loads(body)
    structures = jax.tree.structure((arguments, {})), jax.tree.structure(skeleton)
    return serialize_executable.deserialize_and_load(code, *structures)


def _kind(leaf: Any) -> tuple:
    """All that a program depends on in an argument."""
    aval = jax.typeof(leaf)
    if not isinstance(leaf, jax.Array) or not leaf.committed:
        return aval.shape, aval.dtype.name, aval.weak_type
    where = tuple(sorted(device.id for device in leaf.sharding.device_set))
    return aval.shape, aval.dtype.name, aval.weak_type, leaf.sharding, where


@functools.cache
def _surroundings() -> str:
    """All that a program depends on besides its function and arguments."""
    sources = sorted(_LIBRARY.rglob("*.py"))
    code = hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()
    device = jax.devices()[0]
    machine = device.platform, device.device_kind, jax.device_count(), device.client.platform_version, instructions()
    versions = [f"{name} {version(name)}" for name in ("jax", "jaxlib", "flax", "numpy")]
    settings = [getattr(jax.config, name) for name in _SETTINGS]
    return repr((code, machine, versions, settings, [os.environ.get(name) for name in _VARIABLES]))


@functools.cache
def instructions() -> str:
    """The processor's instruction sets, as far as this system lists them."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
