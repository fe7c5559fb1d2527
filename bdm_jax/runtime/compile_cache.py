"""Compiled programs kept on disk, so that only the first start of a script waits for the compiler."""

import os
from pathlib import Path

import jax

from bdm_jax.runtime import programs


def enable() -> Path:
    """Keep every compiled program in BDM_JAX_CACHE or, where that is not set, in the user's cache folder."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("BDM_JAX_CACHE") or home / "bdm_jax" / "jax")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # cuDNN's attention is partitioned by a Python function, whose address would make every process's key another.
    jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)
    programs.keep(folder / "programs")
    return folder
