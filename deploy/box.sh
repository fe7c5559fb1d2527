#!/bin/bash
# One machine with several GPUs: bash deploy/box.sh
# Change: DATA, RUN and BATCH (a multiple of the GPUs); the config, for what else is to be trained (python train.py --help).
# All GPUs are seen by one process, no launcher is needed. Needs a Python environment with bdm_jax[cuda] in .venv, or active.
set -uo pipefail

DATA=${DATA:-data/latents}
RUN=${RUN:-runs/bdm-sd15}
BATCH=${BATCH:-320}

[ -f .venv/bin/activate ] && source .venv/bin/activate
exec python train.py bdm-sd15-gpu --data.folder "$DATA" --run "$RUN" --batch-size "$BATCH"
