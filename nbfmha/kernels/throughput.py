"""A loop of one MMA on registers, for its raw throughput: what ``nbfmha bench mma`` times, and counts where it cannot.

``throughput(a, b, c, sfa, sfb, d, turns)``: every warp loads the same register images, adds A B to each of ``chains``
independent accumulators, ``MMAS_A_TURN`` MMAs a turn of the loop, the chains in turn, and stores them. ``turns`` >= 1.

========  ==========================================================================================
a, b      (32 lanes, registers) of 32-bit words, as ``ptx_inline.isa.fragments`` packs them
c, d      float32 (chains, 32, 4) and (all warps, chains, 32, 4): the accumulators before and after
sfa, sfb  (32,) words, read by the MMAs that have scales, with selectors 0; else anything
========  ==========================================================================================

It is PTX, made from the description in :mod:`ptx_inline.isa.instructions`, not Python: a turn is the MMAs and three
instructions (ptxas writes four turns out), and an MMA that is described can be measured without a wrapper. The chains
have accumulators of their own from memory, so that an assembler cannot fold them into one.
"""

from __future__ import annotations

import functools

from nbfmha.validation import message
from ptx_inline.isa.instructions import Instruction, instruction
from ptx_inline.toolchain import PtxKernel, Target

MMAS_A_TURN = 16
SIGNATURE = ("u32*", "u32*", "f32*", "u32*", "u32*", "f32*", "i32")


def why_not(mma: str, target: Target) -> str | None:
    """Why ``target`` cannot run the MMA of this key, in words; None where it can. ``ValueError`` for an unknown key."""
    targets = instruction(mma).min_targets
    oldest = Target.parse(targets[0])
    newer = not oldest.suffix and (target.major, target.minor) >= (oldest.major, oldest.minor)
    if newer or target.name in targets:
        return None
    return f"{target} lacks it, needs {' or '.join(targets)}"


@functools.cache
def throughput_kernel(mma: str, chains: int, target: str | Target) -> PtxKernel:
    """The loop for the MMA ``mma``, a key of ``ptx_inline.isa.instructions.INSTRUCTIONS``, on ``target``.

    Raises ``ValueError`` for an unknown key, a target without the instruction, or ``chains`` that do not divide
    ``MMAS_A_TURN``.
    """
    target, description = Target.parse(target), instruction(mma)
    if reason := why_not(mma, target):
        raise ValueError(message("target", f"one that has {mma}", str(target), reason))
    if chains < 1 or MMAS_A_TURN % chains:
        raise ValueError(message("chains", f"a divisor of {MMAS_A_TURN}", chains))
    return PtxKernel(_text(description, chains, target), SIGNATURE)


def _text(description: Instruction, chains: int, target: Target) -> str:
    # PTX for an "a" target runs on it alone; other PTX names the oldest target, which all later ones assemble
    specific = bool(Target.parse(description.min_target).suffix)
    # the other architecture-specific targets are known from PTX 8.8 on
    version = "8.8" if specific and target.name != description.min_target else description.min_ptx
    registers = description.registers
    scales = [name for name in ("sfa", "sfb") if registers[name]]
    parameters = [f".param .u64 p_{name}" for name in ("a", "b", "c", "sfa", "sfb", "d")]
    lines = [
        f".version {version}",
        f".target {target.name if specific else description.min_target}",
        ".address_size 64",
        f".visible .entry throughput({', '.join([*parameters, '.param .u32 p_turns'])})",
        "{",
        "\t.reg .pred %again;",
        "\t.reg .b32 %lane, %warp, %turns, %threads;",
        "\t.reg .b64 %p;",
        *(f"\t.reg .b32 %{name}<{registers[name]}>;" for name in ("a", "b", *scales)),
        *(f"\t.reg .f32 %acc{chain}_<4>;" for chain in range(chains)),
        "\tmov.u32 %warp, %tid.x;",
        "\tand.b32 %lane, %warp, 31;",
    ]
    for name in ("a", "b", *scales):
        words = [f"%{name}{i}" for i in range(registers[name])]
        lines += _address(name, "%lane", 4 * len(words))
        lines.append(f"\tld.global{_vector(words)}.b32 {_braced(words)}, [%p];")
    lines += _address("c", "%lane", 16)
    for chain in range(chains):
        words = _accumulator(chain)
        lines.append(f"\tld.global{_vector(words)}.f32 {_braced(words)}, [%p+{512 * chain}];")
    lines += ["\tld.param.u32 %turns, [p_turns];", "turn:"]
    lines += [f"\t{_mma(description, i % chains)}" for i in range(MMAS_A_TURN)]
    lines += ["\tsub.u32 %turns, %turns, 1;", "\tsetp.ne.u32 %again, %turns, 0;", "\t@%again bra turn;"]
    # place of this lane: ((warp of the grid) * chains * 32 + lane) * 16 bytes
    lines += [
        "\tmov.u32 %turns, %ctaid.x;",
        "\tmov.u32 %threads, %ntid.x;",
        "\tmad.lo.u32 %warp, %turns, %threads, %warp;",
        "\tshr.u32 %warp, %warp, 5;",
        f"\tmad.lo.u32 %lane, %warp, {32 * chains}, %lane;",
    ]
    lines += _address("d", "%lane", 16)
    for chain in range(chains):
        words = _accumulator(chain)
        lines.append(f"\tst.global{_vector(words)}.f32 [%p+{512 * chain}], {_braced(words)};")
    return "\n".join([*lines, "\tret;", "}", ""])


def _mma(description: Instruction, chain: int) -> str:
    registers, acc = description.registers, _braced(_accumulator(chain))
    a, b = (_braced([f"%{name}{i}" for i in range(registers[name])], always=True) for name in ("a", "b"))
    scales = ", {%sfa0}, {0, 0}, {%sfb0}, {0, 0}" if description.sf_vec_size else ""
    return f"{description.mnemonic} {acc}, {a}, {b}, {acc}{scales};"


def _accumulator(chain: int) -> list[str]:
    return [f"%acc{chain}_{i}" for i in range(4)]


def _address(parameter: str, index: str, size: int) -> list[str]:
    return [f"\tld.param.u64 %p, [p_{parameter}];", f"\tmad.wide.u32 %p, {index}, {size}, %p;"]


def _vector(words: list[str]) -> str:
    return f".v{len(words)}" if len(words) > 1 else ""


def _braced(words: list[str], *, always: bool = False) -> str:
    return f"{{{', '.join(words)}}}" if always or len(words) > 1 else words[0]
