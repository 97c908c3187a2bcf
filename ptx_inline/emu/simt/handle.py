"""A group of arrays that compiled code takes as one pointer and reads like a named tuple.

Numba passes a tuple of arrays as seven words an array, counted references included, to every function that it is handed
on to. A *handle* is a pointer to a table of addresses and shapes instead: ``handle.field`` is a view of that array. The
arrays must outlive the call, which is the caller's duty.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import carray, from_dtype, types
from numba.extending import intrinsic, models, overload_attribute, register_model

_WORDS = 4  # of a field in the table: address and up to three sizes
_INT64 = ir.IntType(64)


def table(arrays: NamedTuple) -> np.ndarray:
    """int64 (fields, 4): address and sizes of each C-contiguous array; to be passed to compiled code."""
    rows = np.zeros((len(arrays), _WORDS), np.int64)
    for row, array in zip(rows, arrays, strict=True):
        if not array.flags.c_contiguous:
            raise ValueError("arrays of a handle must be C-contiguous")
        row[0] = array.ctypes.data
        row[1 : 1 + array.ndim] = array.shape
    return rows


def handle_type(name: str, fields: dict[str, tuple[type, int]]) -> Callable:
    """Make a handle type for compiled code; ``fields``: name -> (dtype, dimensions) in the order of the table.

    Returns the function that turns a table (int64 array) into a handle inside compiled code.
    """

    class Handle(types.Type):
        def __init__(self):
            super().__init__(name=name)

    register_model(Handle)(models.OpaqueModel)
    handle = Handle()
    for number, (field, (dtype, dimensions)) in enumerate(fields.items()):
        _add_field(Handle, field, number, from_dtype(np.dtype(dtype)), dimensions)

    @intrinsic
    def from_table(typing_context, array):
        def generate(context, builder, signature, arguments):
            data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
            return builder.bitcast(data, context.get_value_type(handle))

        return handle(array), generate

    return from_table


def _add_field(handle_class: type, field: str, number: int, dtype: types.Type, dimensions: int) -> None:
    @intrinsic
    def address(typing_context, handle):
        def generate(context, builder, signature, arguments):
            word = _load_word(builder, arguments[0], number * _WORDS)
            return builder.inttoptr(word, context.get_value_type(signature.return_type))

        return types.CPointer(dtype)(handle), generate

    @intrinsic
    def shape(typing_context, handle):
        def generate(context, builder, signature, arguments):
            words = [_load_word(builder, arguments[0], number * _WORDS + 1 + axis) for axis in range(dimensions)]
            return context.make_tuple(builder, signature.return_type, words)

        return types.UniTuple(types.int64, dimensions)(handle), generate

    def get(handle):
        return lambda handle: carray(address(handle), shape(handle))

    overload_attribute(handle_class, field)(get)


def _load_word(builder: ir.IRBuilder, pointer: ir.Value, word: int) -> ir.Value:
    words = builder.bitcast(pointer, _INT64.as_pointer())
    return builder.load(builder.gep(words, [_INT64(word)]))
