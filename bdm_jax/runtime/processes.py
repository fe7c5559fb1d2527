"""Several processes that train as one: how they find each other, and their collectives on the host."""

import os

import jax
import numpy as np
from jax.experimental import multihost_utils

from bdm_jax.errors import UserError


def initialize() -> None:
    """Join the other processes of the job, if the environment says that there are any; before JAX is used.

    JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID name the job by hand. Under Slurm, Open
    MPI and on a TPU pod JAX finds all three itself. On a CPU, arrays are exchanged through gloo.

    Raises:
        UserError: a coordinator is named, and the other two variables are not numbers that fit together.
    """
    if os.environ.get("JAX_COORDINATOR_ADDRESS"):
        try:
            count, index = (int(os.environ[name]) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
        except (KeyError, ValueError) as error:
            raise UserError("JAX_COORDINATOR_ADDRESS needs the numbers JAX_NUM_PROCESSES and JAX_PROCESS_ID") from error
        if not 0 <= index < count:
            raise UserError(f"JAX_PROCESS_ID={index} is not one of JAX_NUM_PROCESSES={count}")
    elif _in_cluster():
        count, index = None, None
    else:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(num_processes=count, process_id=index)


def is_first() -> bool:
    """Whether this process is the one that writes files and prints."""
    return jax.process_index() == 0


def is_alive(pid: int) -> bool:
    """Whether a process of this host runs under that number."""
    if pid <= 0:
        return False
    if os.name == "nt":  # there, signal 0 would end it
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        pass
    return True


def broadcast_from_first(value: int) -> int:
    """The first process's value, in all processes. A collective: every process must call it."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def all_agree(ok: bool) -> bool:
    """Whether it is true in every process. A collective: every process must call it."""
    if jax.process_count() == 1:
        return ok
    return bool(np.all(multihost_utils.process_allgather(np.asarray(ok))))


def gather(rows: np.ndarray) -> np.ndarray:
    """(N, ...) numbers of each process -> (processes, N, ...). A collective: every process must call it."""
    return rows[None] if jax.process_count() == 1 else np.asarray(multihost_utils.process_allgather(rows))


def _in_cluster() -> bool:
    tasks = (os.environ.get(name, "1") for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"))
    return any(int(count) > 1 for count in tasks) or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
