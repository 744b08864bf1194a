"""VCPUSet: keep a running QEMU machine at its declared vCPU count."""
