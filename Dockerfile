# `docker build -t simpler-distil-whisper .`; what it runs by itself is `make demo`.
FROM nvidia/cuda:12.8.1-base-ubuntu24.04

RUN apt-get update \
    && apt-get install -y --no-install-recommends git make python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app
# The packages come first, with CUDA's libraries: a change of the code does not install them again.
COPY pyproject.toml constraints.txt README.md LICENSE Makefile ./
COPY simpler_distil_whisper/__init__.py ./simpler_distil_whisper/
RUN make .venv/installed

COPY . .
CMD ["make", "demo"]
