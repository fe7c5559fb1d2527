"""Train one of the runs in configs/: python train.py CONFIG [options]; installed: bdm-train CONFIG [options]."""

import sys

from bdm_jax.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
