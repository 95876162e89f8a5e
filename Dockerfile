# The command `tessera` with everything optional. PyTorch's standard wheel runs on the CPU and on NVIDIA
# GPUs (docker run --gpus all).
FROM python:3.11-slim
WORKDIR /opt/tessera
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY tessera tessera
RUN pip install --no-cache-dir -c constraints.txt '.[quickstart,latents,log,hub,data]' \
    && useradd --create-home user
USER user
WORKDIR /work
ENTRYPOINT ["tessera"]
CMD ["--help"]
