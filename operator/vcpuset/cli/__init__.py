"""The `vcpuset` command."""
