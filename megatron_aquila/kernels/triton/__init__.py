"""Kernels in Triton, a file an op: the package's only door to Triton, opened by the function that runs one.

Written for Triton 3.6 to 3.9. They are compiled on an NVIDIA GPU, and interpreted on a CPU where TRITON_INTERPRET=1 is
set before the first of these files is imported. All read and write bfloat16, float16 or float32 and compute in float32.
"""
