"""The set-up of a machine for the demo and the tests: `python -m harness.setup PART…`, which the Makefile calls.

Only the standard library is used, as this runs before anything is installed. Each part first checks whether its work is
done, so that a repeated set-up takes a fraction of a second:

    system             Debian packages (QEMU, openssl, …), installed as root or through sudo, else named
    system-cluster     those that only `make test-cluster` needs (containerd, buildah, …)
    venv               the virtual environment `.venv` with the pinned Python packages
    guest              kernel and initramfs of the test guest, in the cache folder
    prometheus         Prometheus and promtool, from Debian's packages; only tests need them
    images             container images of the operator, and of QEMU with the guest; only `make test-cluster` needs them
    controlplane, …    each of harness.binaries.BUILDS: built from a pinned Go module into the cache folder
"""

__all__: list[str] = []
