# The image of the operator: docker build -t registry.example.com/vcpuset:0.1.0 .
#
# The base image is pinned by tag to a Python release. The publisher rebuilds that tag with Debian's security updates until
# the next Python release. Raise the tag for fixes of Python itself. To pin the image itself, set a digest:
#   docker build --build-arg BASE=python:3.13.15-slim-bookworm@sha256:… .
# The operator's dependencies are pinned by hash in requirements.txt, at the versions of constraints.txt, as tested. All of them
# are wheels, so nothing is compiled.
ARG BASE=python:3.13.15-slim-bookworm

FROM ${BASE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_NO_INPUT=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONDONTWRITEBYTECODE=1
# Both stages use the same path, because the scripts of the environment contain it.
ARG ENVIRONMENT=/opt/vcpuset
ARG WHEELS=/wheels
WORKDIR /src
COPY pyproject.toml requirements.txt README.md LICENSE ./
COPY operator operator
RUN echo setuptools==84.2.1 --hash=sha256:ca140b45d5325a9478f880e351484f62fef15f336462e449ca0c03c873d589c2 >build.txt \
 && python -m pip install --require-hashes --requirement=build.txt \
 && python -m pip wheel --no-deps --no-build-isolation --wheel-dir="$WHEELS" .
RUN python -m venv --without-pip "$ENVIRONMENT" \
 && python -m pip --python="$ENVIRONMENT" install --no-compile --only-binary=:all: --require-hashes \
    --requirement=requirements.txt \
 && python -m pip --python="$ENVIRONMENT" install --no-compile --no-deps "$WHEELS"/vcpuset-*.whl \
 && "$ENVIRONMENT/bin/vcpuset" --version
# Bytecode of all modules, in a separate directory: the base image contains none for the standard library. Since an image does
# not change, the bytecode is not checked against the sources.
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
# pip is not needed in a container, and removing it reduces the attack surface.
RUN python -m pip uninstall --yes --root-user-action=ignore pip
COPY --from=build ${ENVIRONMENT} ${ENVIRONMENT}
# The root filesystem may be read-only: the bytecode exists already, and the user has no home directory.
ENV PATH=${ENVIRONMENT}/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONPYCACHEPREFIX=${ENVIRONMENT}/bytecode \
    PYTHONUNBUFFERED=1 \
    HOME=/
USER 65532:65532
EXPOSE 8080
ENTRYPOINT ["vcpuset"]
CMD ["run"]
