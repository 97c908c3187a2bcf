"""Decode calls that repeat, with torch tensors: what one call has found out serves the next one of its kind.

A call of :func:`nbfmha.decode` is known by its ``key``: shape, dtype and device of q, the options, the gate. What its
checks say and what it chooses (problem, implementation, splits, kernels, all arguments but a few addresses) depend on the
key and on the cache alone, and are kept as a ``Plan``. A later call with the same key checks its tensors; where one is not
as expected, it is left to the full checks to say what is wrong, or to run it.

A plan has addresses of the cache's arrays, which therefore stay where they are, and of what its calls use one after the
other (:mod:`nbfmha.decode_scratch`); it goes when they go.
"""

from __future__ import annotations

import math
import sys
from typing import Any
from weakref import WeakKeyDictionary

from nbfmha.decode_scratch import room_of, tickets_of
from nbfmha.dispatch import gate
from nbfmha.gpu_arrays import is_capturing
from nbfmha.kernels import decode as kernels
from nbfmha.kernels.decode_sizes import Splits
from nbfmha.kv_layout import CacheArrays, CacheLayout
from nbfmha.problem import Problem
from ptx_inline.toolchain.arrays import is_torch
from ptx_inline.toolchain.parameters import Placeholder

SIZE = 256
"""Plans that are kept for one cache."""

_ADDRESSES = 5
_Q, _SEQ_IDS, _SINKS, _OUT, _LSE = map(Placeholder, range(_ADDRESSES))
_plans: WeakKeyDictionary[CacheArrays, dict[tuple, Plan]] = WeakKeyDictionary()


class Plan:
    """The launch of one kind of call on one cache, prepared.

    Args:
        q: a tensor that passed all checks; another one of its shape, dtype and device will do as well.
        problem, splits, implementation: what was chosen for it. has_lse, has_sinks: of the call.
    """

    def __init__(
        self,
        q: Any,
        layout: CacheLayout,
        arrays: CacheArrays,
        problem: Problem,
        splits: Splits,
        implementation: str,
        *,
        has_lse: bool,
        has_sinks: bool,
    ):
        self.layout = layout
        self._torch = torch = sys.modules["torch"]
        self._device, device = q.device, q.get_device()
        self._q = q.dtype, q.shape, device
        self._seq_ids = torch.int32, q.shape[:1], device
        self._sinks = torch.float32, q.shape[2:3], device
        self._bytes = q.numel() * q.element_size()
        self._lse_shape = (problem.batch, problem.num_heads_q, problem.seqlen_q) if has_lse else None
        parts, tickets = (), None
        if shapes := kernels.part_shapes(layout, problem, splits):
            sizes = [math.prod(shape) for shape in shapes]
            room, tickets = room_of(arrays, q, sum(sizes)).data_ptr(), tickets_of(arrays, q, splits.teams)
            parts = room, room + 4 * sizes[0]
        launch = kernels.launch_of(
            _Q, layout, arrays, _SEQ_IDS, problem, splits, implementation=implementation, out=_OUT,
            lse=_LSE if has_lse else None, sinks=_SINKS if has_sinks else None, parts=parts, tickets=tickets,
        )  # fmt: skip
        self._launch = launch.prepare(device, _ADDRESSES)

    def run(self, q: Any, seq_ids: Any, sinks: Any, out: Any) -> Any:
        """What ``nbfmha.decode`` returns; None, with nothing done, where the full checks have to look at a tensor."""
        torch = self._torch
        q_at, ids_at = _address(torch, q, *self._q), _address(torch, seq_ids, *self._seq_ids)
        if not q_at or q_at % 16 or not ids_at:
            return None
        sinks_at = lse_at = 0
        if sinks is not None:
            sinks_at = _address(torch, sinks, *self._sinks)
            if not sinks_at:
                return None
        if out is None:
            out = torch.empty_like(q, memory_format=torch.contiguous_format)
            out_at = out.data_ptr()
        else:
            out_at = _address(torch, out, *self._q)
            if not out_at or out_at % 16 or abs(out_at - q_at) < self._bytes:
                return None
        if self._lse_shape:
            lse = torch.empty(*self._lse_shape, dtype=torch.float32, device=self._device)
            lse_at = lse.data_ptr()
        stream = torch._C._cuda_getCurrentRawStream(self._q[2])
        self._launch((q_at, ids_at, sinks_at, out_at, lse_at), stream)
        return (out, lse) if self._lse_shape else out


def key_of(
    q: Any,
    cache: Any,
    impl: Any,
    softmax_scale: Any,
    window: Any,
    softcap: Any,
    num_splits: Any,
    has_lse: bool,
    has_sinks: bool,
) -> tuple | None:
    """What tells calls on one cache apart, addresses aside; None for q of other libraries, and for (k, v)."""
    if not is_torch(q) or isinstance(cache, tuple):
        return None
    options = impl, softmax_scale, window, softcap, num_splits, has_lse, has_sinks
    kinds = type(softmax_scale), type(softcap), type(num_splits)  # True is 1, but no number of splits
    return q.shape, q.dtype, q.get_device(), cache.max_length, gate(), options, kinds


def find(cache: Any, key: tuple | None) -> Plan | None:
    """The plan that was kept for these, if there is one."""
    try:
        plan = None if key is None else _plans[cache.arrays].get(key)
    except (KeyError, TypeError):  # no plans there, or options that are none
        return None
    return plan if plan is not None and plan.layout is cache.layout else None


def keep(
    key: tuple,
    q: Any,
    layout: CacheLayout,
    arrays: CacheArrays,
    problem: Problem,
    splits: Splits,
    implementation: str,
    has_lse: bool,
    has_sinks: bool,
) -> None:
    """Keep the plan of a call that has passed all checks, for as long as the arrays live; not of one that is captured,
    whose tickets may be the graph's."""
    if not splits.teams or not isinstance(arrays, CacheArrays) or is_capturing(q):
        return
    plans = _plans.setdefault(arrays, {})
    if len(plans) >= SIZE:
        plans.clear()
    plans[key] = Plan(q, layout, arrays, problem, splits, implementation, has_lse=has_lse, has_sinks=has_sinks)


def _address(torch: Any, x: Any, dtype: Any, shape: tuple[int, ...], device: int) -> int:
    """Of a contiguous tensor of these on that GPU which records no gradient; 0 for all else."""
    if (
        isinstance(x, torch.Tensor)
        and x.dtype == dtype
        and x.shape == shape
        and x.get_device() == device
        and x.is_contiguous()
        and not (x.requires_grad and torch.is_grad_enabled())
    ):
        return x.data_ptr()
    return 0
