"""Measurements of pdfast_kernels. `python -m benchmarks.static` reads the machine code, and needs no GPU."""
