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
from numba import from_dtype, types
from numba.core.typing.templates import AttributeTemplate
from numba.extending import infer_getattr, intrinsic, lower_getattr_generic, models, register_model
from numba.np.arrayobj import populate_array

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
    _add_attributes(handle, fields)

    @intrinsic
    def from_table(typing_context, array):
        def generate(context, builder, signature, arguments):
            data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
            return builder.bitcast(data, context.get_value_type(handle))

        return handle(array), generate

    return from_table


def _add_attributes(handle: types.Type, fields: dict[str, tuple[type, int]]) -> None:
    """Typing and code of ``handle.field``: an array that borrows its memory, built from the table's words."""
    arrays = {name: types.Array(from_dtype(np.dtype(dtype)), ndim, "C") for name, (dtype, ndim) in fields.items()}
    numbers = {name: number for number, name in enumerate(fields)}

    @infer_getattr
    class Attributes(AttributeTemplate):
        key = type(handle)

        def generic_resolve(self, handle, name):
            return arrays.get(name)

    @lower_getattr_generic(type(handle))
    def generate(context, builder, handle_type, value, name):
        array_type, first = arrays[name], numbers[name] * _WORDS
        array = context.make_array(array_type)(context, builder)
        data_type = context.get_data_type(array_type.dtype).as_pointer()
        data = builder.inttoptr(_load_word(builder, value, first), data_type)
        shape = [_load_word(builder, value, first + 1 + axis) for axis in range(array_type.ndim)]
        item = context.get_abi_sizeof(context.get_data_type(array_type.dtype))
        strides = [_INT64(item)]
        for size in shape[:0:-1]:
            strides.insert(0, builder.mul(strides[0], size))
        populate_array(array, data=data, shape=shape, strides=strides, itemsize=_INT64(item), meminfo=None)
        return array._getvalue()


def _load_word(builder: ir.IRBuilder, pointer: ir.Value, word: int) -> ir.Value:
    words = builder.bitcast(pointer, _INT64.as_pointer())
    return builder.load(builder.gep(words, [_INT64(word)]))
