"""What a training costs on a TPU slice, before one is rented: `python -m bdm_jax.plan bdm-sd15 --topology v5e:16x16`.

The run's own step is compiled for the slice on this machine, through libtpu's ahead-of-time path: no TPU, no weights
and no data are needed, only shapes. Read from the compiled program: memory, FLOPs and collectives per chip; estimated
from them by `costs.roofline`: seconds per step, days, chip-hours. The compiler is asked for its lowest effort, which at
full size takes 3 CPU minutes and 5 GB in place of 20 and 14; a run's own program is scheduled and fused better than
this one. Results are kept on disk: the same program for the same slice is compiled once.

With --shapes nothing is compiled, and libtpu is not needed: the state, the frozen networks and the gradients of each
chip are added up by their shardings, and what the gradient keeps of a sample is found by tracing the loss.
"""

import sys

from bdm_jax.plan.command import main

if __name__ == "__main__":
    sys.exit(main())
