# Two images from one file: `orchestrator` (no torch) and `worker` (with torch). Build from the checkout:
#   docker compose build
# The classic builder is enough. What changes seldom comes first, so that a changed source line costs seconds to build.
ARG PYTHON=python:3.11-slim

FROM ${PYTHON} AS base
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore FLEET_HEALTH_FILE=/tmp/fleet-healthy
RUN groupadd --gid 10001 fleet && useradd --uid 10001 --gid fleet --create-home fleet
WORKDIR /opt/fleet
COPY constraints.txt pyproject.toml README.md LICENSE ./
# fleet's dependencies, read from pyproject.toml: this layer stays while only sources change.
RUN python -c 'import tomllib; print("\n".join(tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]))' \
      > dependencies.txt \
 && pip install -c constraints.txt -r dependencies.txt hatchling

FROM base AS orchestrator
COPY deploy/healthy.sh /usr/local/bin/fleet-healthy
COPY fleet fleet
RUN pip install --no-deps --no-build-isolation -c constraints.txt . && python -m compileall -q -o 0 "$(python -c 'import fleet; print(fleet.__path__[0])')"
# A volume that is mounted here for the first time takes over the owner.
RUN install -d -o fleet -g fleet -m 700 /var/lib/fleet
# Metrics are for Prometheus, in the containers' network; the page there wants its token.
ENV FLEET_STATE_DIR=/var/lib/fleet FLEET_METRICS_HOST=0.0.0.0
USER fleet
WORKDIR /home/fleet
EXPOSE 50051 8080
ENTRYPOINT ["fleet"]
CMD ["orchestrator", "--bind", "0.0.0.0:50051"]

FROM base AS worker-base
# CPU builds are smaller: docker compose build --build-arg TORCH_INDEX=<the index of torch's CPU wheels>
ARG TORCH_INDEX=
RUN pip install -c constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch

FROM worker-base AS worker
COPY deploy/healthy.sh /usr/local/bin/fleet-healthy
COPY fleet fleet
RUN pip install --no-deps --no-build-isolation -c constraints.txt . && python -m compileall -q -o 0 "$(python -c 'import fleet; print(fleet.__path__[0])')"
# A volume that is mounted here for the first time takes over the owner.
RUN install -d -o fleet -g fleet -m 700 /var/lib/fleet-output
# Metrics are for Prometheus, in the containers' network.
ENV FLEET_STORAGE_DIR=/var/lib/fleet-output FLEET_METRICS_HOST=0.0.0.0
USER fleet
WORKDIR /home/fleet
EXPOSE 50052 9090
ENTRYPOINT ["fleet"]
CMD ["worker"]
