# kvbench on an NVIDIA GPU: PyPI's build of torch brings the CUDA libraries, so the host needs the driver and the container toolkit alone.
#
#   docker build -f docker/cuda.Dockerfile -t kvbench:cuda .
#   docker run --rm --gpus all -v "$PWD/results:/kvbench/results" kvbench:cuda run method=snapkv model=qwen3-8b task.limit=5
FROM python:3.11-slim
RUN apt-get update && apt-get install --yes --no-install-recommends git gcc g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /kvbench
COPY requirements.lock .
RUN pip install --no-cache-dir --requirement requirements.lock
COPY . .
RUN git config --system --add safe.directory /kvbench \
    && pip install --no-cache-dir --no-deps --no-build-isolation --editable .
ENTRYPOINT ["kvbench"]
CMD ["--help"]
