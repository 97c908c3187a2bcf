"""Appends to one cache, with the launches prepared where rows lie as before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nbfmha.gpu_arrays import stream_of
from nbfmha.kernels import append as kernels
from nbfmha.kv_layout import CacheArrays, CacheLayout
from nbfmha.tiles import View
from ptx_inline.toolchain.arrays import is_torch
from ptx_inline.toolchain.parameters import Placeholder

SIZE = 256
"""Kinds of appends whose launches are kept."""

_ADDRESSES = 3
_K, _V, _WORK = map(Placeholder, range(_ADDRESSES))


class Appends:
    """Queues appends to one cache. With torch all but three addresses is prepared, by strides and number of CTAs; the
    arrays of the cache stay where they are.

    mean_given, tickets: as in :func:`nbfmha.kernels.append.append`.
    """

    def __init__(self, arrays: CacheArrays, layout: CacheLayout, mean_given: Any, tickets: Any):
        self._arrays, self._layout = arrays, layout
        self._state = {"mean_given": mean_given, "tickets": tickets}
        self._with_torch = is_torch(arrays.lengths)
        self._prepared: dict[tuple, list[Callable]] = {}

    def queue(self, k: View, v: View, work: Any, longest: int) -> None:
        """As :func:`nbfmha.kernels.append.append`, on the library's current stream."""
        if not self._with_torch:
            kernels.append(self._arrays, self._layout, k, v, work, longest, **self._state)
            return
        key = k.strides, v.strides, work.shape[0], kernels.parts_of(longest)
        prepared = self._prepared.get(key)
        if prepared is None:
            prepared = self._prepare(*key)
        addresses = k.array.data_ptr(), v.array.data_ptr(), work.data_ptr()
        stream = stream_of(self._arrays.lengths)
        for launch in prepared:
            launch(addresses, stream)

    def _prepare(self, k_strides: tuple, v_strides: tuple, sequences: int, parts: int) -> list[Callable]:
        views = View(_K, k_strides), View(_V, v_strides)
        launches = kernels.launches(self._arrays, self._layout, *views, _WORK, sequences, parts, **self._state)
        if len(self._prepared) >= SIZE:
            self._prepared.clear()
        device = self._arrays.lengths.get_device()
        prepared = [launch.prepare(device, _ADDRESSES) for launch in launches]
        self._prepared[k_strides, v_strides, sequences, parts] = prepared
        return prepared
