"""What the compiler makes of a kernel, without a GPU.

code = read(launch, 90)                         the launch compiled for sm_90, and its machine code read
main = main_arguments(launch, launches)         its large tensors, among those of all launches of the operation
failures(code, main, width=128, tensor_cores=False)     why it does not pass the gate, one line each
"""

from benchmarks.machine_code.code import Code, name_of, read, versions
from benchmarks.machine_code.gate import SHARED_MEMORY, failures, is_main, main_arguments

__all__ = ["SHARED_MEMORY", "Code", "failures", "is_main", "main_arguments", "name_of", "read", "versions"]
