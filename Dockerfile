# gemma-convert for the CPU, logit-check included.
#   docker build -t gemma-convert .
#   docker run --rm -v "$PWD:/data" -u "$(id -u):$(id -g)" gemma-convert to-native SRC OUT --format maxtext
# EXTRAS adds object stores (check,s3,gcs). On x86 pip takes PyTorch's build for CUDA, which is larger by gigabytes and
# runs on the CPU too; PIP_EXTRA_INDEX_URL, the index of PyTorch's CPU builds, keeps the image small.
FROM python:3.12-slim AS build
ARG EXTRAS=check
ARG PIP_EXTRA_INDEX_URL=
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY mappings mappings
COPY gemma_convert gemma_convert
RUN python -m venv /opt/gemma-convert
RUN /opt/gemma-convert/bin/python -m pip install --no-cache-dir ".[$EXTRAS]"

FROM python:3.12-slim
COPY --from=build /opt/gemma-convert /opt/gemma-convert
# What the hub downloads and JAX compiles; mount a folder here to keep it.
ENV HF_HOME=/cache/huggingface XDG_CACHE_HOME=/cache PYTHONUNBUFFERED=1
RUN mkdir -m 1777 /cache
WORKDIR /data
ENTRYPOINT ["/opt/gemma-convert/bin/gemma-convert"]
CMD ["--help"]
