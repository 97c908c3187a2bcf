"""``for i in unroll(n)`` in kernels: a loop that is written out before Numba sees it.

Numba has no unroll pragma, and libNVVM unrolls by its own thresholds. A register array (``cuda.local.array``) stays in
registers only while every index is a constant, so loops over fragments are written out here, with the loop variable as
a literal. The bounds are evaluated from what the function closes over.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable


def unroll(*bounds: int) -> range:
    """As ``range``. Inside a function that :func:`unrolled` made, the loop over it is written out."""
    return range(*bounds)


def unrolled(function: Callable) -> Callable:
    """The same function with each ``for name in unroll(...)`` written out.

    Raises ``ValueError`` for a loop with ``break``, ``continue`` or ``else``, or a bound that is no constant.
    """
    lines, first_line = inspect.getsourcelines(function)
    definition = ast.parse(textwrap.dedent("".join(lines))).body[0]
    definition.decorator_list = []
    ast.increment_lineno(definition, first_line - 1)
    closure = inspect.getclosurevars(function)
    names = {**closure.builtins, **closure.globals, **closure.nonlocals}
    definition = _Unroller(names).visit(definition)

    # the new function closes over the same values: they become parameters of a function around it
    free = function.__code__.co_freevars
    outer = ast.parse(f"def enclose({', '.join(free)}):\n    return None").body[0]
    outer.body = [definition, ast.Return(ast.Name(definition.name, ast.Load()))]
    module = ast.fix_missing_locations(ast.Module([outer], []))
    namespace: dict = {}
    exec(compile(module, function.__code__.co_filename, "exec"), function.__globals__, namespace)
    result = namespace["enclose"](*(cell.cell_contents for cell in function.__closure__ or ()))
    result.__qualname__, result.__doc__ = function.__qualname__, function.__doc__
    return result


class _Unroller(ast.NodeTransformer):
    def __init__(self, names: dict):
        self._names = names

    def visit_For(self, node: ast.For):
        if not (isinstance(node.iter, ast.Call) and getattr(node.iter.func, "id", None) == "unroll"):
            return self.generic_visit(node)
        bad = [inner for inner in ast.walk(node) if isinstance(inner, ast.Break | ast.Continue)]
        if bad or node.orelse or not isinstance(node.target, ast.Name):
            raise ValueError(f"line {node.lineno}: a loop over unroll() takes one name and no break, continue or else")
        try:
            bounds = [eval(compile(ast.Expression(bound), "<unroll>", "eval"), self._names) for bound in node.iter.args]
        except NameError as error:
            raise ValueError(
                f"line {node.lineno}: bounds of unroll() must be compile-time constants: {error}"
            ) from None
        written_out = []
        for value in range(*bounds):
            for statement in node.body:
                visited = self.visit(_with_literal(statement, node.target.id, value))
                written_out += visited if isinstance(visited, list) else [visited]
        return written_out or ast.copy_location(ast.Pass(), node)


def _with_literal(part, name: str, value: int):
    """A copy of a part of a syntax tree, in which ``name`` is a literal where it is read."""
    if isinstance(part, list):
        return [_with_literal(item, name, value) for item in part]
    if not isinstance(part, ast.AST):
        return part
    if isinstance(part, ast.Name) and part.id == name and isinstance(part.ctx, ast.Load):
        return ast.copy_location(ast.Constant(value), part)
    copied = type(part).__new__(type(part))
    copied.__dict__.update((field, _with_literal(content, name, value)) for field, content in part.__dict__.items())
    return copied
