"""Machine code of every kernel and snippet for every target, without a GPU: the right instructions, nothing spilled."""

import pytest

from nbfmha.kernels.catalogue import CATALOGUE, kernel
from nbfmha.kernels.dequantize import tokens_kernel as dequantize_tokens
from nbfmha.kernels.prefill import prefill_kernel
from nbfmha.kernels.prepass_delta import delta_kernel
from nbfmha.kernels.qk import HEAD_DIMS, qk_kernel
from nbfmha.kernels.quantize import rows_kernel
from nbfmha.steady_loop import steady_loop
from ptx_inline.toolchain import TARGETS, Kernel, instruction_mix


@pytest.fixture(scope="module", autouse=True)
def module_cache(tmp_path_factory):
    """One kernel cache for all of this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NBFMHA_CACHE_DIR", str(tmp_path_factory.mktemp("kernels")))
        yield


def assert_nothing_spilled(compiled, target):
    resources = compiled.resources(target)
    mix = instruction_mix(compiled.sass(target))
    assert (resources.spill_store_bytes, resources.spill_load_bytes) == (0, 0), f"{compiled.name} spills on {target}"
    assert resources.stack_bytes == 0, f"{compiled.name} has a stack frame on {target}"
    assert mix.local_memory == 0, f"{compiled.name} uses local memory on {target}"
    return mix


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", [name for name in CATALOGUE if not name.startswith(("prefill", "decode"))])
def test_every_kernel_assembles_without_a_spill(name, target):
    mix = assert_nothing_spilled(kernel(name, target), target)
    opcodes = " ".join(mix.opcodes)
    if name in ("probe", "qk"):
        assert ("OMMA.SF.16864" in opcodes) == (target == "sm_120a")
        assert ("HMMA.16816.F32" in opcodes) == (target != "sm_120a")
    if name.startswith("quantize"):
        assert ("E2M1" in opcodes) == (target in ("sm_100a", "sm_120a")), "the conversion instruction, where there is one"


@pytest.mark.parametrize(("name", "others", "span"), [("prefill", 9.1, 210), ("prefill_64", 15.7, 210)])
def test_the_steady_loop_of_prefill_on_sm_120a(name, others, span):
    """SageAttention3, compiled: 12.3 and 20.9 other instructions an OMMA, 468 in a row without one (FACTS section 6)."""
    compiled = kernel(name, "sm_120a")
    mix = assert_nothing_spilled(compiled, "sm_120a")
    assert mix.opcodes["OMMA.SF.16864.F32.E2M1.E2M1.UE4M3.4X"] == mix.mma
    loop = steady_loop(compiled.sass("sm_120a"))
    assert loop.mma == (32 if name == "prefill" else 16)
    assert loop.others_per_mma <= others
    assert loop.longest_span <= span


@pytest.mark.parametrize("target", [pytest.param("sm_80", marks=pytest.mark.slow), "sm_90a"])
def test_prefill_dequantised_spills_little(target):
    """head_dim 64: nothing. 128, where the accumulators of 32 queries take 192 registers: a few words in local memory."""
    small = kernel("prefill_64", target)
    assert steady_loop(small.sass(target)).mma == 128
    assert small.resources(target).spill_store_bytes == 0
    assert kernel("prefill", target).resources(target).spill_store_bytes <= 16


@pytest.mark.parametrize(
    ("head_dim", "spilled"), [(64, 0), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((128, 16), (256, 128)))]
)
def test_legacy_prefill_is_all_plain_fp4_mma(head_dim, spilled):
    """At head_dim 128 ptxas takes 168 registers, for three CTAs an SM, over two words that wait outside of the loop."""
    compiled = prefill_kernel("legacy", head_dim, pv="e4m3")
    mix = instruction_mix(compiled.sass("sm_120a"))
    assert compiled.resources("sm_120a").spill_store_bytes <= spilled
    both = ("QMMA.16832.F32.E2M1.E2M1", "QMMA.16832.F32.E4M3.E2M1")
    # Q K^T: 8 n tiles and head_dim / 32 steps; P V: head_dim / 8 n tiles and 2 steps
    assert [mix.opcodes[name] for name in both] == [head_dim // 4, head_dim // 4]
    assert mix.mma == head_dim // 2


def test_legacy_prefill_is_for_targets_with_its_mma():
    assert kernel("prefill_legacy", "sm_120a") is prefill_kernel("legacy", 64, pv="e4m3")
    with pytest.raises(ValueError, match=r"arch must be sm_120a or sm_121a for 'prefill_legacy', .*, got sm_90a"):
        kernel("prefill_legacy", "sm_90a")


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("scales_in", ["shared", "global"])
def test_qk_on_sm_120a_is_all_block_scale_mma(head_dim, scales_in):
    mix = assert_nothing_spilled(qk_kernel("blockscale", head_dim, "linear", scales_in), "sm_120a")
    k_steps = -(-head_dim // 64)
    assert mix.opcodes["OMMA.SF.16864.F32.E2M1.E2M1.UE4M3.4X"] == 8 * k_steps == mix.mma


@pytest.mark.parametrize(
    ("dtype", "head_dim", "mma"),
    [
        ("float16", 128, 32),
        pytest.param("bfloat16", 128, 48, marks=pytest.mark.slow),
        pytest.param("bfloat16", 256, 24, marks=pytest.mark.slow),
        pytest.param("float32", 96, 32, marks=pytest.mark.slow),
    ],
)
def test_corrections_are_bound_by_mma(dtype, head_dim, mma):
    """An ``mma`` of this size takes 5.7 clocks of a quarter of an SM at the 667 TFLOP/s that an H100 reaches with it."""
    compiled = delta_kernel(dtype, head_dim)
    assert_nothing_spilled(compiled, "sm_90a")
    loop = steady_loop(compiled.sass("sm_90a"))
    assert loop.mma % mma == 0, "steps of 16 channels, one or all of a slab"
    assert loop.instructions < 5.7 * loop.mma


def test_the_fullest_variants_keep_their_registers():
    fullest = [
        (rows_kernel("float32", "nvfp4", "four_over_six", "blocked_128x4", True, True), "sm_90a"),
        (rows_kernel("float32", "mxfp4", "amax", "interleaved_64", False, False), "sm_80"),
        (dequantize_tokens("float32", "mxfp4", "blocked_128x4", False), "sm_90a"),
        (qk_kernel("dequant", 256, "blocked_128x4", "global", True), "sm_90a"),
    ]
    for compiled, target in fullest:
        assert_nothing_spilled(compiled, target)


def make_call(name, arguments):
    """A kernel that calls one snippet with arguments read from memory and stores what it returns."""
    from numba import cuda
    from numba.core import types

    from ptx_inline import device as dev
    from ptx_inline.types import numba_type

    function = getattr(dev, name)
    kinds = tuple(numba_type(kind) for kind in arguments)
    # the snippet's parameters, each as an expression over the kernel's own
    expressions = []
    for position, kind in enumerate(arguments):
        pointer = {"f32*": "f", "u32*": "u", "u8*": "b", "i32*": "i"}.get(kind)
        constant = f"types.{kinds[position].name}(0)" if not pointer else ""
        expressions.append(pointer or (constant if kind == "u16" else f"types.{kinds[position].name}(u[{position}])"))
    result = "u[8] = types.uint32(" if name_returns(name) else "("
    source = f"def call(f, u, b, i):\n    {result}function({', '.join(expressions)}))\n"
    namespace = {"function": function, "types": types, "cuda": cuda}
    exec(source, namespace)
    return namespace["call"]


def prototypes():
    """Name, argument types and result type of every snippet, read off the declarations."""
    import re
    from pathlib import Path

    import ptx_inline

    text = (Path(ptx_inline.__file__).parent / "device.py").read_text()
    text = text.replace("{_MMA}", "f32*, u32*, u32*, f32*")
    for result, name, arguments in re.findall(r'f?"(\w+) (\w+)\(([^"]*)\)"', text):
        yield name, tuple(part.strip() for part in arguments.split(",") if part.strip()), result


PROTOTYPES = {name: (arguments, result) for name, arguments, result in prototypes() if name != "f"}


def name_returns(name):
    return PROTOTYPES[name][1] != "void"


@pytest.mark.parametrize("name", PROTOTYPES)
def test_every_snippet_assembles_for_the_oldest_target_that_has_it(name):
    only_120a = ("mxf4nvf4", "f8f6f4", "b4x16")
    target = "sm_120a" if any(part in name for part in only_120a) else "sm_80"
    compiled = Kernel(make_call, ("f32*", "u32*", "u8*", "i32*"), {"name": name, "arguments": PROTOTYPES[name][0]})
    assert "call" in compiled.ptx(target)
    assert_nothing_spilled(compiled, target)
