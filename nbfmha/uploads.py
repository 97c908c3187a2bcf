"""Small host tables on a device, uploaded once for a stream and kept, such as the sequences of a step that repeats."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

from nbfmha import gpu_arrays


class Uploads:
    """Tables where ``like`` lies, by key; the ``size`` latest, and those that a CUDA graph was captured with, for good.

    The library that owns a table frees memory in the order of the stream on which it was allocated: a table serves the
    stream of its upload, and graphs, whose capture begins after that stream is waited for.
    """

    def __init__(self, like: Any, size: int = 64):
        self._like, self._size = like, size
        self._recent: OrderedDict[Hashable, tuple[int, Any]] = OrderedDict()
        self._pinned: dict[Hashable, Any] = {}

    def get(self, key: Hashable, make: Callable[[], np.ndarray]) -> Any:
        """The table of this key, made and uploaded if it is new. Raises ``RuntimeError`` for a new one while a CUDA
        graph is captured."""
        found = self._recent.get(key)
        if gpu_arrays.is_capturing(self._like):
            if key not in self._pinned:
                if found is None:
                    raise RuntimeError("the first call for these sequences copies a table; make it before the capture")
                self._pinned[key] = found[1]
            return self._pinned[key]
        stream = gpu_arrays.stream_of(self._like)
        if found is None or found[0] != stream:
            found = stream, gpu_arrays.upload(self._like, make())
            self._recent[key] = found
            if len(self._recent) > self._size:
                self._recent.popitem(last=False)
        self._recent.move_to_end(key)
        return found[1]
