"""Measurements, a command a question: `python -m benchmarks.` kernels, tune, static; step, first, loader, busy."""
