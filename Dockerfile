# syntax=docker/dockerfile:1
# One image for drawing, serving and training; what differs is the JAX in it:
#   docker build -t bdm-jax .                                 CPU
#   docker build -t bdm-jax:cuda --build-arg DEVICE=cuda .    NVIDIA GPUs (the host needs the driver and its container toolkit)
#   docker build -t bdm-jax:tpu --build-arg DEVICE=tpu .      TPU
# docs/deploying.md says how to run it.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

ARG DEVICE=cpu
WORKDIR /app
COPY pyproject.toml setup.cfg setup.py README.md LICENSE NOTICE ./
COPY bdm_jax bdm_jax
COPY configs configs
COPY convert convert
COPY assets assets
RUN set -eu; \
    case "$DEVICE" in \
      cpu) extras=web,gcs,s3 ;; \
      cuda) extras=web,gcs,s3,cuda ;; \
      tpu) extras=web,gcs,s3,tpu ;; \
      *) echo "DEVICE=$DEVICE: known are cpu, cuda, tpu" >&2; exit 2 ;; \
    esac; \
    pip install --no-cache-dir ".[$extras]"; \
    rm -rf build ./*.egg-info
COPY sample.py train.py ./

# Nobody in particular: with `--user` any other number works as well, if it may write to the two volumes.
RUN useradd --uid 10001 --no-create-home --home-dir /cache --shell /usr/sbin/nologin bdm \
    && install -d -m 0777 -o bdm /cache /out /models
USER 10001
# All that is written beside the results: compiled programs, downloads, scratch. The rest may be read-only.
ENV HOME=/cache \
    XDG_CACHE_HOME=/cache \
    BDM_JAX_CACHE=/cache/jax \
    HF_HOME=/cache/huggingface \
    MPLCONFIGDIR=/cache/matplotlib \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
VOLUME ["/cache", "/out"]
EXPOSE 7860
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:7860/health', timeout=4)"]
# It is reached from outside of the container, so it starts only with BDM_JAX_API_KEYS set, or with --no-auth added.
CMD ["python", "-m", "bdm_jax.web", "--listen", "--port", "7860", "--models", "/models", "--out", "/out"]
