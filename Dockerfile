# Two targets, the same steps as the Makefile:
#   docker build --target cpu  -t manylora:cpu .
#   docker build --target cuda -t manylora:cuda .
#   docker run -p 8000:8000 -v manylora:/data manylora:cpu                      # the demo
#   docker run --gpus all -p 8000:8000 -v manylora:/data -v ./adapters:/adapters:ro -e MANYLORA_ADMIN_KEY=… \
#       manylora:cuda serve Qwen/Qwen2.5-7B-Instruct
# Calls from the host come from another machine as the container sees it. Without MANYLORA_ADMIN_KEY they may ask models,
# but /adapters and /exports answer them 403. Choose the port in the container by MANYLORA_PORT, which the health check
# follows too (a --port flag it can't see).
FROM python:3.12-slim AS base
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    MANYLORA_HOST=0.0.0.0 MANYLORA_DATA_DIR=/data MANYLORA_ADAPTER_ROOT=/adapters HF_HOME=/data/huggingface
RUN useradd --create-home --uid 1000 manylora && mkdir /data /adapters && chown manylora /data /adapters
WORKDIR /app
COPY pyproject.toml constraints-cpu.txt README.md LICENSE ./

# The native CPU kernels are compiled where a compiler is; the images need none.
FROM base AS kernels
RUN apt-get update && apt-get install -y --no-install-recommends g++
COPY . .
RUN python -m pip wheel --no-deps --wheel-dir /wheels .

FROM base AS cpu
RUN python -m pip install torch -c constraints-cpu.txt
RUN --mount=type=bind,from=kernels,source=/wheels,target=/wheels \
    python -m pip install "$(echo /wheels/manylora-*.whl)[nf4]" -c constraints-cpu.txt
USER manylora
EXPOSE 8000
VOLUME ["/data"]
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + (os.environ.get('MANYLORA_PORT') or '8000') + '/ready', timeout=2)"]
# SIGINT drains; the second one stops.
STOPSIGNAL SIGINT
ENTRYPOINT ["manylora"]
CMD ["serve"]

FROM base AS cuda
RUN python -m pip install torch
COPY . .
RUN python -m pip install '.[nf4]'
USER manylora
EXPOSE 8000
VOLUME ["/data"]
HEALTHCHECK --interval=10s --timeout=3s --start-period=600s \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + (os.environ.get('MANYLORA_PORT') or '8000') + '/ready', timeout=2)"]
STOPSIGNAL SIGINT
ENTRYPOINT ["manylora"]
CMD ["serve"]
