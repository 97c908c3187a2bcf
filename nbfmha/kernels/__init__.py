"""Numba CUDA kernels. Each file: the maths and who does what, the device functions, the kernel, its constants.

Importing these modules imports neither Numba nor a driver: kernels are built by factories at first use.
"""
