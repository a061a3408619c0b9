# kvbench on a CPU. From the checkout's root:
#
#   docker build -f docker/cpu.Dockerfile -t kvbench:cpu .
#   docker run --rm -v "$PWD/results:/kvbench/results" kvbench:cpu run method=snapkv task.source=mini task.limit=3
FROM python:3.11-slim
RUN apt-get update && apt-get install --yes --no-install-recommends git g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /kvbench
COPY requirements.lock .
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu --requirement requirements.lock
COPY . .
RUN git config --system --add safe.directory /kvbench \
    && pip install --no-cache-dir --no-deps --no-build-isolation --editable .
ENTRYPOINT ["kvbench"]
CMD ["--help"]
