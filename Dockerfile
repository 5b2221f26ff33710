# The project on CUDA: `docker run --gpus all IMAGE` distils the demo's Whisper. See docs/cluster.md.
# gcc and python3-dev are for triton, with which torch.compile makes its kernels.
FROM nvidia/cuda:12.6.3-base-ubuntu24.04

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates gcc git make python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY . .
RUN make .venv/installed

CMD ["make", "demo"]
