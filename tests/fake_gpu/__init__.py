"""Updates on fake cuda tensors in a CPU build of torch, and the code that the compiler generates for a GPU that is not there.

`python -m tests.fake_gpu.report GUARD.so` prints what the tests look at. GUARD.so is guard.cpp, compiled.
"""
