"""Test tooling: a real control plane, real QEMU guests, and faults that real ones cannot be made to show."""
