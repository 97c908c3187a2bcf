"""Hand-written PTX for tests: a body, wrapped into a complete file with one kernel."""

from ptx_inline.emu import emulate

#: Registers of every kernel: predicates, and 16, 32, 64 bits, f32 and f64 of each kind.
REGISTERS = (
    ".reg .pred %p<16>;",
    ".reg .b16 %h<32>;",
    ".reg .b32 %r<64>;",
    ".reg .b64 %rd<32>;",
    ".reg .f32 %f<32>;",
    ".reg .f64 %fd<16>;",
)


def kernel(body: str, params: str = "", declarations: str = "", module: str = "") -> str:
    """PTX of one kernel ``k``: ``params`` are types such as ``"u64 u32"`` for parameters ``p0``, ``p1``, ...; each u64 one
    is loaded into ``%rd`` of its number first. ``declarations`` go into the kernel, ``module`` before it."""
    types = params.split()
    declared = ", ".join(f".param .{type} p{number}" for number, type in enumerate(types))
    loads = [f"ld.param.u64 %rd{number}, [p{number}];" for number, type in enumerate(types) if type == "u64"]
    head = [".version 8.8", ".target sm_120a", ".address_size 64", *module.splitlines()]
    lines = [*head, f".visible .entry k({declared})", "{", *REGISTERS, *declarations.splitlines(), *loads]
    return "\n".join([*lines, *body.strip().splitlines(), "ret;", "}"]) + "\n"


def line_of(ptx: str, text: str) -> int:
    """Number of the only line that contains ``text``."""
    found = [number for number, line in enumerate(ptx.splitlines(), 1) if text in line]
    assert len(found) == 1, f"{text!r} must be on one line, is on {found}"
    return found[0]


def run(body, args=(), block=(32,), grid=(1,), *, declarations="", module="", params=None, **options):
    """Outputs of a kernel whose parameters are all 64 bits wide unless ``params`` says otherwise."""
    ptx = kernel(body, "u64 " * len(args) if params is None else params, declarations, module)
    return emulate(ptx, grid, block, list(args), **options).outputs


#: ``%r0`` = thread in the CTA, ``%rd20`` = 4 times that, ``%rd21`` = address of the thread's word in the first argument.
WORD = """
mov.u32 %r0, %tid.x;
mul.wide.u32 %rd20, %r0, 4;
add.s64 %rd21, %rd0, %rd20;
"""
