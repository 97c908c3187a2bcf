"""The order in which a program's blocks are laid out, so that diverged lanes meet again as early as they can.

The core always runs the lanes of a warp that stand at the lowest program counter. Lanes then wait for each other where
their paths meet, if every path leads forward: blocks in topological order, each loop in one piece with what follows it
after it. That is the weak topological order of Bourdoncle ("Efficient chaotic iteration strategies with widenings",
1993), used as priorities as in Diamos et al. ("SIMD re-convergence at thread frontiers", 2011).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def weak_topological_order(successors: Sequence[Sequence[int]], entry: int = 0) -> list[int]:
    """Blocks reachable from ``entry``; ``successors[b]`` are the blocks that ``b`` may go to."""
    return _order(successors, {*range(len(successors))}, [entry])


def _order(successors: Sequence[Sequence[int]], inside: set[int], entries: list[int]) -> list[int]:
    result = []
    for component in _components(successors, inside, entries):
        head = component.pop()  # the one that was reached first
        result.append(head)
        if component:
            body = set(component)
            result += _order(successors, body, [block for block in successors[head] if block in body])
    return result


def _components(successors: Sequence[Sequence[int]], inside: set[int], entries: list[int]) -> list[list[int]]:
    """Strongly connected components (Tarjan), topologically sorted; each ends with the block that was reached first."""
    number: dict[int, int] = {}
    low: dict[int, int] = {}
    open_blocks: list[int] = []
    still_open: set[int] = set()
    path: list[tuple[int, Iterator[int]]] = []
    found: list[list[int]] = []

    def reach(block: int) -> None:
        number[block] = low[block] = len(number)
        open_blocks.append(block)
        still_open.add(block)
        path.append((block, iter(successors[block])))

    for entry in entries:
        if entry not in number:
            reach(entry)
        while path:
            block, following = path[-1]
            for next_block in following:
                if next_block in inside and next_block not in number:
                    reach(next_block)
                    break
                if next_block in still_open:
                    low[block] = min(low[block], number[next_block])
            else:
                path.pop()
                if path:
                    low[path[-1][0]] = min(low[path[-1][0]], low[block])
                if low[block] == number[block]:
                    component = []
                    while not component or component[-1] != block:
                        component.append(open_blocks.pop())
                        still_open.discard(component[-1])
                    found.append(component)
    return found[::-1]
