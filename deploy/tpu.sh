#!/bin/bash
# bdm-sd15 on a GKE cluster with a TPU slice of 256 v5e chips or of 128 v5p, through XPK: bash deploy/tpu.sh v5e, or v5p
# Change: CLUSTER, ZONE and PROJECT, as of `xpk cluster list`; IMAGE, built with DEVICE=tpu and pushed to a registry that
# the cluster reads; BUCKET, where the run's folder lies; STORAGE, attached to the cluster (`xpk storage attach`) and
# mounted at /data, with the latents and the models. Memory, speed and cost of other slices: docs/scaling.md.
set -euo pipefail

SLICE=${1:-v5e}
case $SLICE in
v5e) TYPE=v5litepod-256 ZONE=${ZONE:-us-west4-a} ;;
v5p) TYPE=v5p-256 ZONE=${ZONE:-us-east5-a} ;; # named by its cores, two on a chip
*) echo "$SLICE: no slice that there is a config for; take v5e or v5p" >&2 && exit 2 ;;
esac
CLUSTER=${CLUSTER:-bdm}
PROJECT=${PROJECT:-my-project}
IMAGE=${IMAGE:-us-docker.pkg.dev/my-project/bdm/bdm-jax:tpu}
BUCKET=${BUCKET:-my-bucket}
STORAGE=${STORAGE:-bdm-data}
DATA=${DATA:-/data/latents}
MODELS=${MODELS:-/data/models}
WORKLOAD=${WORKLOAD:-bdm-sd15-$SLICE}

# A pod that is told to go has five minutes for a checkpoint and ends with 3; XPK starts the workload again after that
# and after a crash (127 to 255), not after an error that would come again (2).
xpk workload create \
    --cluster "$CLUSTER" --zone "$ZONE" --project "$PROJECT" \
    --workload "$WORKLOAD" --tpu-type "$TYPE" --num-slices 1 \
    --docker-image "$IMAGE" --storage "$STORAGE" \
    --max-restarts 100 --restart-on-exit-codes 3 --termination-grace-period-seconds 300 \
    --command "python train.py bdm-sd15-$SLICE --run gs://$BUCKET/runs/$WORKLOAD --data.folder $DATA --task.backbone $MODELS/stable-diffusion-v1-5 --task.text-encoder $MODELS/bdm/branch_text_encoder --task.tokenizer $MODELS/bdm/branch_tokenizer"
