"""PTX instructions for Numba CUDA kernels, one at a time, and everything about each of them.

``isa`` describes formats, fragment layouts and arithmetic (NumPy only); ``snippets`` and ``device`` issue the
instructions from kernels; ``toolchain`` compiles kernels for any GPU, with or without one. Nothing here knows attention.
"""
