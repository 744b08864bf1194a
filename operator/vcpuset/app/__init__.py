"""The operator as a process: settings, wiring, health, metrics."""
