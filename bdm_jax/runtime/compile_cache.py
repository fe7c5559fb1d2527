"""Compiled programs kept on disk, so that only the first start of a script waits for the compiler."""

import math
import os
import tempfile
import warnings
from pathlib import Path

import jax

from bdm_jax.paths import user_cache
from bdm_jax.runtime import programs


def enable() -> Path | None:
    """Keep every compiled program in BDM_JAX_CACHE or, where that is not set, in the user's cache folder.

    A folder that cannot be written is read; without one nothing is kept, and None returned. Either is noted once.
    """
    folder, why = _folder()
    if folder is None:
        warnings.warn(f"compiled programs are not kept for the next start: {why}", stacklevel=2)
        programs.keep(None)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf if why else 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # cuDNN's attention is partitioned by a Python function, whose address would make every process's key another.
    jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)
    # Of every entry that a full disk refuses; `programs` says it once.
    warnings.filterwarnings("ignore", "Error writing persistent compilation cache entry")
    if why:
        warnings.warn(f"new compiled programs are not kept for the next start: {why}", stacklevel=2)
    programs.keep(folder / "programs", write=not why)
    return folder


def _folder() -> tuple[Path | None, str]:
    """The folder, None where there is none to be read, and why it cannot be written."""
    named, home = os.environ.get("BDM_JAX_CACHE"), user_cache()
    if not named and home is None:
        return None, "there is no home folder (set BDM_JAX_CACHE to a folder)"
    folder = Path(named) if named else home / "jax"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        return folder, ""
    except OSError as error:
        readable = os.path.isdir(folder) and os.access(folder, os.R_OK | os.X_OK)
        why = f"{folder} cannot be written ({error.strerror or error}; set BDM_JAX_CACHE to another folder)"
        return (folder if readable else None), why
