# The kit on one GPU, with JupyterLab:
#
#   docker build -t kit .
#   docker run --rm -it --gpus all --network host --ipc host \
#     -v "$HOME/.cache/huggingface:/home/kit/.cache/huggingface" kit
#
# JupyterLab listens on 127.0.0.1 of the host only and prints its address with a token. A run:
#
#   docker run --rm --gpus all --network host --ipc host kit \
#     python -m kit run notebooks/02_train_to_solve.ipynb
#
# `./build.sh --docker` and `./train.sh --docker` are the first and the last of these.
#
# The devel image, because engine and trainer compile kernels for the GPU that they find. Without
# `--gpus all` the same image runs the tiny model on the CPU.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# Python.h for the kernels' compiler, libnuma for SGLang. Ubuntu's own versions go with its Python.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends --yes \
        ca-certificates git libnuma1 make python3.12 python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/* \
    && userdel --remove ubuntu \
    && useradd --create-home --uid 1000 --shell /bin/bash kit \
    && install -d -o kit -g kit /home/kit/work /home/kit/.cache /home/kit/.cache/huggingface

USER kit
WORKDIR /home/kit/work
ENV VIRTUAL_ENV=/home/kit/venv \
    PATH=/home/kit/venv/bin:$PATH \
    KIT_PYTHON=/home/kit/venv/bin/python \
    PYTHONUNBUFFERED=1

# Packages first: they change seldom, and the layer is large.
COPY --chown=kit:kit requirements.lock ./
RUN python3.12 -m venv "$VIRTUAL_ENV" \
    && pip install --no-cache-dir uv==0.13.9 \
    && uv pip install --no-cache --compile-bytecode -r requirements.lock

COPY --chown=kit:kit . .
RUN uv pip install --no-cache --no-deps --editable .

EXPOSE 8888
ENV JUPYTER_CONFIG_PATH=/home/kit/work/notebooks/.jupyter
CMD ["python", "-m", "jupyterlab", "--ip=127.0.0.1", "--no-browser", \
     "--ServerApp.root_dir=notebooks", "--LabApp.default_url=/lab/tree/START.md"]
