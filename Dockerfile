# The image of the operator: docker build -t registry.example.com/vcpuset:0.1.0 .
#
# The base image is pinned by its tag: this release of Python, whose image the publisher renews with Debian's security
# updates as long as there is no later one. Raise it for Python's own. To pin the image itself, give its digest:
#   docker build --build-arg BASE=python:3.13.15-slim-bookworm@sha256:… .
# The operator's own dependencies are those of constraints.txt, as tested, and all are ready-made wheels: nothing is compiled.
ARG BASE=python:3.13.15-slim-bookworm

FROM ${BASE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_NO_INPUT=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONDONTWRITEBYTECODE=1
# Both stages have the environment in the same place: its programs name it.
ARG ENVIRONMENT=/opt/vcpuset
ARG WHEELS=/wheels
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY operator operator
RUN python -m pip install setuptools==84.2.1 \
 && python -m pip wheel --no-deps --no-build-isolation --wheel-dir="$WHEELS" .
RUN python -m venv --without-pip "$ENVIRONMENT" \
 && python -m pip --python="$ENVIRONMENT" install --no-compile --only-binary=:all: --constraint=constraints.txt \
    "$WHEELS"/vcpuset-*.whl \
 && "$ENVIRONMENT/bin/vcpuset" --version
# Bytecode of all that may be loaded, in a folder of its own: the base image has none of the standard library. An image does
# not change, so that nobody need compare it with the sources.
RUN export PYTHONPYCACHEPREFIX="$ENVIRONMENT/bytecode" \
 && compile() { python -m compileall -q --invalidation-mode=unchecked-hash "$@"; } \
 && compile -x '/(tests?|idlelib|site-packages)/' "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" \
 && compile "$ENVIRONMENT/lib"

FROM ${BASE}
ARG ENVIRONMENT=/opt/vcpuset
LABEL org.opencontainers.image.title="vcpuset" \
      org.opencontainers.image.description="Kubernetes operator that keeps a running QEMU machine at its declared vCPU count" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
# Nothing is installed in a container: what is not there cannot be used by others either.
RUN python -m pip uninstall --yes --root-user-action=ignore pip
COPY --from=build ${ENVIRONMENT} ${ENVIRONMENT}
# The root may be read-only: bytecode is there already, and the user has no home.
ENV PATH=${ENVIRONMENT}/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONPYCACHEPREFIX=${ENVIRONMENT}/bytecode \
    PYTHONUNBUFFERED=1 \
    HOME=/
USER 65532:65532
EXPOSE 8080
ENTRYPOINT ["vcpuset"]
CMD ["run"]
