"""Random programs: the emulator against Python integers and rational numbers, and against a GPU where there is one."""

import numpy as np
import pytest
from elementwise import emulated
from executors import on_gpu
from hypothesis import HealthCheck, example, given, seed, settings
from hypothesis import strategies as st
from random_programs import MOVES, REGISTERS, STEPS, Step, inputs, kernel, oracle, programs

from ptx_inline.emu import Output

_COMMON = {"deadline": None, "derandomize": True, "database": None}


def run(executor, program, content):
    """Registers at the end, uint64 (REGISTERS, threads)."""
    threads = content.shape[1]
    arguments = content, Output(content.shape, np.uint64)
    return executor(kernel(program, threads), (max(threads // 64, 1),), (min(threads, 64),), arguments)[1]


def named(name):
    return next(case for case in (*STEPS, *MOVES) if case.name == name)


@settings(max_examples=120, suppress_health_check=list(HealthCheck), **_COMMON)
@given(program=programs(), number=st.integers(0, 2**16))
@example([Step(named("fma.rn.ftz.f32"), (0, 1, 2, 0)), Step(named("mov f to r"), (0, 1))], 3)
def test_emulator_equals_the_oracle(program, number):
    content = inputs(number, 32)
    np.testing.assert_array_equal(run(emulated, program, content), oracle(program, content))


@settings(max_examples=8, suppress_health_check=list(HealthCheck), **_COMMON)
@given(program=programs(60))
def test_programs_assemble(program):
    found = kernel(program, 64)
    assert found.resources("sm_90a").spill_store_bytes == 0
    assert "EXIT" in found.sass("sm_90a")


def test_programs_reach_every_pool_and_most_of_the_catalogue():
    assert {case.result for case in STEPS} == {"u32", "u64", "f32", "f16x2"}
    assert len(STEPS) > 200
    assert inputs(1, 5).shape == (REGISTERS, 5)
    with pytest.raises(StopIteration):
        named("nothing")


@pytest.mark.gpu
def test_gpu_equals_the_emulator(gpu):
    """256 threads a program; NaN bits count, since every step's NaN is documented."""
    compared = []

    @seed(1)
    @settings(max_examples=200, suppress_health_check=list(HealthCheck), deadline=None, database=None)
    @given(program=programs(40), number=st.integers(0, 2**16))
    def compare(program, number):
        content = inputs(number, 256)
        np.testing.assert_array_equal(run(emulated, program, content), run(on_gpu(gpu), program, content))
        compared.append(len(program))

    compare()
    print(f"\nrandom programs: {len(compared)} of {sum(compared)} instructions, {256 * REGISTERS} registers each, equal")
    assert len(compared) >= 100
