"""The plugin `kubectl vcpuset`."""
