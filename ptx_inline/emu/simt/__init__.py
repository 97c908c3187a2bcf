"""The compiled core: one warp instruction after another, by Numba on the CPU."""
