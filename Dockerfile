# The pipeline, the tracking server, the REST server and the web page in one image (docs/containers.md):
#   docker build --tag catdog .                                      TensorFlow for the CPU
#   docker build --tag catdog:gpu --build-arg GPU=1 .                TensorFlow with CUDA

ARG BASE=python:3.11-slim-bookworm

# ---- The environment, by the project's own set-up. It depends on the lock files alone: a change of the code does not make it anew.
FROM ${BASE} AS environment
RUN apt-get update \
    && apt-get install --yes --no-install-recommends make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/catdog
COPY Makefile pyproject.toml requirements.lock requirements-gpu.lock ./
# What the project's entry in the environment needs of it; the code itself follows below.
RUN mkdir -p src/catdog && touch README.md src/catdog/__init__.py
ARG GPU=""
# Of another package index, if you have one: its address, without a password (that belongs into the secret `netrc`).
ARG PIP_INDEX_URL
ARG UV_INDEX_URL
RUN --mount=type=cache,target=/root/.cache \
    --mount=type=secret,id=netrc,target=/root/.netrc \
    UV_LINK_MODE=copy make setup GPU="${GPU}"

# ---- What runs.
FROM ${BASE}
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git \
    && rm -rf /var/lib/apt/lists/* \
    # A checkout that is mounted into the container may belong to another user.
    && git config --system --add safe.directory '*'
ARG UID=1000
# `docker run --user` may give any other user: the home folder is open to all, as /tmp is, and the name does not depend on the user's number.
RUN useradd --uid "${UID}" --user-group --create-home --no-log-init catdog \
    && chmod 1777 /home/catdog \
    && install --directory --owner=catdog --group=catdog /project
ENV HOME=/home/catdog LOGNAME=catdog USER=catdog

COPY --from=environment /opt/catdog/.venv /opt/catdog/.venv
# The code of the checkout in which a command starts goes before the image's own, as in the stages' commands in dvc.yaml.
ENV PATH=/opt/catdog/.venv/bin:${PATH} \
    PYTHONPATH=src:/project/src \
    PYTHONUNBUFFERED=1 \
    DVC_NO_ANALYTICS=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

USER ${UID}
WORKDIR /project
COPY --chown=catdog:catdog pretrained pretrained
COPY --chown=catdog:catdog . .
# DVC and the model registry work in a git repository; a checkout that is mounted over this folder brings its own.
RUN git init --quiet --initial-branch=main \
    && git add --all \
    && git -c user.name=catdog -c user.email=catdog@localhost commit --quiet --message "The project as the image has it"

CMD ["catdog", "--help"]
