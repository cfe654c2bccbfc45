"""Sixteen numbers at a time, in numba: a SIMD vector as a value of compiled code.

LLVM turns most loops into SIMD code by itself. Not those whose length it learns too late, such as a loop over the few
channels of a pixel; those are written with these functions. LLVM splits the vectors into whatever the processor has.
Importing this module imports numba.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core.datamodel import PrimitiveModel
from numba.extending import intrinsic, register_model

__all__ = ["LANES", "add_product", "add_scaled", "load", "store", "total"]

LANES = 16
_INDEX = ir.IntType(32)
_function: Any = intrinsic  # for type checkers: what it makes is not called as what it decorates


class _Vector(types.Type):
    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        super().__init__(name=f"Lanes({dtype})")


@register_model(_Vector)
class _VectorModel(PrimitiveModel):
    def __init__(self, manager: Any, vector: _Vector) -> None:
        number = ir.FloatType() if vector.dtype == types.float32 else ir.DoubleType()
        super().__init__(manager, vector, ir.VectorType(number, LANES))


def _address(context, builder, array_type, array, index):
    start = builder.gep(context.make_array(array_type)(context, builder, array).data, [index])
    return builder.bitcast(start, context.get_value_type(_Vector(array_type.dtype)).as_pointer())


def _multiply_and_add(builder, total, a, b):
    return builder.fadd(total, builder.fmul(a, b, flags=("contract",)), flags=("contract",))


@_function
def load(typing, array, index):
    """array[index : index + LANES] of a contiguous array."""

    def generate(context, builder, signature, arguments):
        vector = builder.load(_address(context, builder, signature.args[0], *arguments))
        vector.align = context.get_abi_sizeof(vector.type.element)
        return vector

    return _Vector(array.dtype)(array, types.intp), generate


@_function
def store(typing, array, index, vector):
    """array[index : index + LANES] = vector."""

    def generate(context, builder, signature, arguments):
        written = builder.store(arguments[2], _address(context, builder, signature.args[0], *arguments[:2]))
        written.align = context.get_abi_sizeof(arguments[2].type.element)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), generate


@_function
def add_scaled(typing, total, number, vector):
    """total + number * vector."""

    def generate(context, builder, signature, arguments):
        kind = arguments[0].type
        nothing = ir.Constant(kind, ir.Undefined)
        one = builder.insert_element(nothing, arguments[1], ir.Constant(_INDEX, 0))
        everywhere = builder.shuffle_vector(one, nothing, ir.Constant(ir.VectorType(_INDEX, LANES), [0] * LANES))
        return _multiply_and_add(builder, arguments[0], everywhere, arguments[2])

    return total(total, total.dtype, vector), generate


@_function
def add_product(typing, total, a, b):
    """total + a * b, lane by lane."""

    def generate(context, builder, signature, arguments):
        return _multiply_and_add(builder, *arguments)

    return total(total, a, b), generate


@_function
def total(typing, vector):
    """The sum of all lanes, halves added to each other again and again."""

    def generate(context, builder, signature, arguments):
        (rest,) = arguments
        width = LANES
        while width > 1:
            width //= 2
            parts = [
                builder.shuffle_vector(
                    rest, rest, ir.Constant(ir.VectorType(_INDEX, width), list(range(at, at + width)))
                )
                for at in (0, width)
            ]
            rest = builder.fadd(*parts)
        return builder.extract_element(rest, ir.Constant(_INDEX, 0))

    return vector.dtype(vector), generate
