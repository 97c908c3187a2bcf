"""Who holds each element of an MMA operand: the view of a fragment that tables and drawings share."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

WARP_SIZE = 32


@dataclass(frozen=True)
class Ownership:
    """Per element (row, col) of an operand, int arrays of its shape: the lowest lane that holds it, the register and
    the lowest bit there, and how many lanes hold a copy (0: no lane). elements_of_lane: (32,) elements that each lane
    holds.
    """

    title: str
    row_name: str
    col_name: str
    element_bits: int
    lane: np.ndarray
    register: np.ndarray
    bit: np.ndarray
    copies: np.ndarray
    elements_of_lane: np.ndarray

    def runs(self, row: int) -> list[tuple[int, int]]:
        """[start, stop) of neighbours in a row that share lane and register, in ascending bit order."""
        lane, register, bit = self.lane[row], self.register[row], self.bit[row]
        breaks = (np.diff(lane) != 0) | (np.diff(register) != 0) | (np.diff(bit) != self.element_bits)
        edges = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(lane)]
        return list(pairwise(edges))

    def label(self, row: int, start: int, stop: int) -> str:
        """ "T5 r2" for a whole register, "T5 r0[8:16]" for bits 8 to 15 of it; "x4" where four lanes hold copies."""
        if self.copies[row, start] == 0:
            return "no lane"
        text = f"T{self.lane[row, start]} r{self.register[row, start]}"
        width = (stop - start) * self.element_bits
        if width < 32:
            text += f"[{self.bit[row, start]}:{self.bit[row, start] + width}]"
        return text if self.copies[row, start] == 1 else f"{text} x{self.copies[row, start]}"

    def replication(self) -> str:
        """One sentence on how many lanes hold each element and which lanes hold none."""
        counts = np.unique(self.copies)
        each = (
            f"exactly {counts[0]} lane{'s' if counts[0] != 1 else ''}"
            if len(counts) == 1
            else f"{counts.min()} to {counts.max()} lanes"
        )
        idle = np.count_nonzero(self.elements_of_lane == 0)
        unread = f"; {idle} of 32 lanes are not read" if idle else ""
        return f"each element is held by {each}{unread}"


def ownership(fragment) -> Ownership:
    """The view of a ``ptx_inline.isa.fragments.Fragment``."""
    shape = fragment.shape
    lane, register, bit = (np.full(shape, -1) for _ in range(3))
    elements_of_lane = np.zeros(WARP_SIZE, dtype=int)
    for owner in reversed(range(WARP_SIZE)):  # the lowest lane writes last and stays
        held = fragment.row[owner] >= 0
        place = fragment.row[owner][held], fragment.col[owner][held]
        lane[place] = owner
        register[place] = fragment.register[held]
        bit[place] = fragment.bit[held]
        elements_of_lane[owner] = np.count_nonzero(held)
    row_name, col_name = axis_names(fragment.operand)
    return Ownership(
        title=f"{fragment.operand} of {fragment.mma}: {shape[0]} x {shape[1]}, {fragment.element_bits} bits an element",
        row_name=row_name,
        col_name=col_name,
        element_bits=fragment.element_bits,
        lane=lane,
        register=register,
        bit=bit,
        copies=fragment.owners(),
        elements_of_lane=elements_of_lane,
    )


def axis_names(operand: str) -> tuple[str, str]:
    """Names of an operand's rows and columns. B and SFB are shown as they are stored: one row for each n."""
    return {
        "A": ("row m", "k"),
        "B": ("column n", "k"),
        "C": ("row m", "column n"),
        "SFA": ("row m", "block of k"),
        "SFB": ("column n", "block of k"),
    }[operand]
