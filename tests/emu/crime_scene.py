"""What tests of forbidden programs share: run a kernel that commits a crime, and compare all that the error says."""

import numpy as np
import pytest
from ptx_text import kernel, line_of

from ptx_inline.emu import emulate

SHARED = ".shared .align 16 .b8 shared[256];"
LOCAL = ".local .align 8 .b8 local[24];"
#: ``%r0``: thread, ``%r1``: lane, ``%r2``: warp, ``%r3``: address of the thread's word of shared memory.
WHERE = """
mov.u32 %r0, %tid.x;
mov.u32 %r1, %laneid;
mov.u32 %r2, %warpid;
mov.u32 %r3, shared;
shl.b32 %r4, %r0, 2;
add.u32 %r3, %r3, %r4;
setp.eq.u32 %p0, %r0, 0;
setp.eq.u32 %p1, %r2, 0;
"""


def words(count=32, dtype=np.uint32):
    return np.arange(1, count + 1).astype(dtype)


def build(body, args=()):
    return kernel(WHERE + body, "u64 " * len(args), SHARED + "\n" + LOCAL)


def is_legal(body, args=(), block=(32,), grid=(1,), **options):
    """Run it; returns the outputs."""
    return emulate(build(body, args), grid, block, list(args), **options).outputs


def is_crime(error, message, body, args=(), block=(32,), grid=(1,), *, cta=(0, 0, 0), warp=0, lane=None, address=None,
             **options):  # fmt: skip
    """The line marked ``// HERE`` commits ``error``, with just this message."""
    ptx = build(body, args)
    with pytest.raises(error) as caught:
        emulate(ptx, grid, block, list(args), **{"workers": 1} | options)
    found = caught.value
    assert type(found) is error
    assert str(found).partition("\n  PTX line")[0] == message
    line = line_of(ptx, "// HERE")
    assert (found.line, found.text) == (line, ptx.splitlines()[line - 1].strip())
    assert (found.cta, found.warp, found.lane, found.address) == (cta, warp, lane, address)
    assert f"PTX line {line}: {found.text}" in str(found)
    return found


def race(mine, theirs, warp, lane, where, cta=(0, 0, 0)):
    """The message of a data race; lane ``None`` for several of the warp's."""
    verb = {"read": "read of", "write": "write to"}[mine]
    whom = f"warp {warp} lane {lane} of CTA {cta} has"
    if lane is None:
        whom = f"several lanes of warp {warp} of CTA {cta} have"
    return f"data race: {verb} a byte that {whom} {theirs}, and nothing orders the two ({where})"
