"""Thread-to-element layouts: each a bijection, and equal to CuTe's description of the same operand."""

from __future__ import annotations

import numpy as np

from nbfmha.testing import compare
from nbfmha.validate.case import Context, Registry, Result

registry = Registry()


def every_fragment():
    """Each operand of each MMA, scales with every selector that the instruction takes."""
    from ptx_inline.isa.fragments import fragment
    from ptx_inline.isa.instructions import INSTRUCTIONS

    for key, instruction in INSTRUCTIONS.items():
        for operand in ("A", "B", "C"):
            yield fragment(key, operand)
        if instruction.sf_vec_size:
            for operand, thread_ids in (("SFA", instruction.thread_ids_a), ("SFB", instruction.thread_ids_b)):
                for byte_id in instruction.byte_ids:
                    for thread_id in thread_ids:
                        yield fragment(key, operand, byte_id=byte_id, thread_id=thread_id)


@registry.case("fragments", "every element is held by exactly one lane", evidence="computed")
def one_owner(context: Context) -> Result:
    owners = [fragment.owners().ravel() for fragment in every_fragment()]
    what = f"elements of {len(owners)} operands (all scale selectors)"
    return Result.of(compare(np.concatenate(owners), np.ones(sum(map(len, owners)))), what)


@registry.case("fragments", "no two elements share a bit of a register", evidence="computed")
def no_overlap(context: Context) -> Result:
    used = []
    for fragment in every_fragment():
        bits = np.zeros((fragment.registers, 32), int)
        for register, bit in zip(fragment.register, fragment.bit, strict=True):
            bits[register, bit : bit + fragment.element_bits] += 1
        if fragment.operand in ("A", "B", "C") and not np.all(bits == 1):
            return Result.failed("bits left out or shared", f"{fragment.operand} of {fragment.mma}")
        used.append(bits.max())
    return Result.of(compare(used, np.ones(len(used))), "operands")


@registry.case("fragments", "pack, then unpack, gives the matrix back", evidence="computed")
def pack_unpack(context: Context) -> Result:
    rng = context.rng("pack_unpack")
    got, expected = [], []
    for fragment in every_fragment():
        matrix = rng.integers(0, 2**fragment.element_bits, (3, *fragment.shape), dtype=np.uint64).astype(fragment.dtype)
        got.append(fragment.unpack(fragment.pack(matrix, fill=0xFFFFFFFF)).ravel())
        expected.append(matrix.ravel())
    return Result.of(compare(np.concatenate(got), np.concatenate(expected)), "elements")


@registry.case("fragments", "A, B, C equal CuTe's layouts, column-major", evidence="computed")
def cute_agreement(context: Context) -> Result:
    from ptx_inline.isa.cute import LAYOUTS
    from ptx_inline.isa.instructions import INSTRUCTIONS

    got, expected = [], []
    for fragment in every_fragment():
        if fragment.operand in ("A", "B", "C"):
            layout = LAYOUTS[INSTRUCTIONS[fragment.mma].element_bits][fragment.operand]
            got.append((fragment.col * fragment.shape[0] + fragment.row).ravel())
            expected.append(layout.offsets().ravel())
    return Result.of(compare(np.concatenate(got), np.concatenate(expected)), f"(lane, value) places of {len(got)} operands")


@registry.case("fragments", "SFA, SFB equal CuTe's, for every selector", evidence="computed")
def cute_scales(context: Context) -> Result:
    from ptx_inline.isa.cute import scale_layouts
    from ptx_inline.isa.instructions import INSTRUCTIONS

    got, expected = [], []
    for fragment in every_fragment():
        if fragment.operand in ("SFA", "SFB"):
            instruction = INSTRUCTIONS[fragment.mma]
            rows = fragment.shape[0]
            # CuTe gives each lane one value an element of k: take the first of every block, column-major
            offsets = scale_layouts(instruction.shape[2])[fragment.operand].offsets()[:, :: instruction.sf_vec_size]
            read = fragment.row[:, 0] >= 0
            got.append((fragment.col * instruction.sf_vec_size * rows + fragment.row)[read].ravel())
            expected.append(offsets[read].ravel())
    return Result.of(compare(np.concatenate(got), np.concatenate(expected)), f"scale places of {len(got)} selections")
