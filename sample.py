"""Pictures from prompts: python sample.py "红灯笼" (installed: bdm-sample "红灯笼")."""

import sys

from bdm_jax.commands.sample import main

if __name__ == "__main__":
    sys.exit(main())
