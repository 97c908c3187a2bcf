"""Kernels compiled, assembled and disassembled for a target: the expected instructions, no spill, no local memory.

Nothing is run; neither a GPU nor a driver is needed. Without the CUDA toolchain (wheels or system) these cases are skipped,
or fail where the target was asked for by name.
"""

from __future__ import annotations

from nbfmha.validate.case import Context, Registry, Result

registry = Registry()

#: Kernels of the catalogue whose machine code is read.
KERNELS = ("quantize", "dequantize", "probe", "qk")

#: What the matrix instructions of a kernel must be, as opcode prefix and substring, where the target has block scaling
#: and where it does not.
BLOCK_SCALE_MMA = ("OMMA.SF.16864", "UE4M3.4X")
DEQUANT_MMA = ("HMMA.16816", "F32")


def _assemble(context: Context, name: str, *, mma: bool) -> Result:
    from nbfmha import doctor

    missing = [part.name for part in (*doctor.toolchain(), doctor.disassembler()) if not part.found]
    if missing:
        reason = f"toolchain incomplete: {', '.join(missing)}; install nbfmha[cu13]"
        return Result.failed("not assembled", reason) if context.target_required else Result.skipped(reason)

    from nbfmha.kernels import catalogue
    from ptx_inline.toolchain import Target, instruction_mix

    kernel = catalogue.kernel(name, context.target)
    mix = instruction_mix(kernel.sass(context.target))
    resources = kernel.resources(context.target)
    prefix, part = BLOCK_SCALE_MMA if Target.parse(context.target).has_block_scale_mma else DEQUANT_MMA
    expected = sum(count for opcode, count in mix.opcodes.items() if opcode.startswith(prefix) and part in opcode)
    spilled = resources.spill_store_bytes + resources.spill_load_bytes
    details = {
        "kernel": kernel.name,
        "target": context.target,
        "instructions": mix.total,
        "mma": mix.mma,
        "opcodes": mix.opcodes,
        "registers": resources.registers,
        "spilled_bytes": spilled,
        "stack_bytes": resources.stack_bytes,
        "local_memory_instructions": mix.local_memory,
    }
    what = f"{mix.mma} x {prefix}...{part}, " if mma else ""
    metric = f"{what}{mix.total} instructions, {resources.registers} registers"
    problems = []
    if mma and (expected == 0 or expected != mix.mma):
        problems.append(f"{expected} of {mix.mma} matrix instructions are {prefix}...{part}")
    if not mma and mix.mma:
        problems.append(f"{mix.mma} matrix instructions, expected none")
    if spilled or resources.stack_bytes or mix.local_memory:
        problems.append(
            f"{spilled} bytes spilled, {resources.stack_bytes} bytes of stack, {mix.local_memory} local loads and stores"
        )
    if problems:
        return Result.failed(metric, "; ".join(problems), **details)
    return Result.passed(f"{metric}, no spill, no local memory", **details)


@registry.case("assembled", "quantise kernel assembles", evidence="assembled")
def assemble_quantize(context: Context) -> Result:
    return _assemble(context, "quantize", mma=False)


@registry.case("assembled", "dequantise kernel assembles", evidence="assembled")
def assemble_dequantize(context: Context) -> Result:
    return _assemble(context, "dequantize", mma=False)


@registry.case("assembled", "probe kernel: the expected MMA, once", evidence="assembled")
def assemble_probe(context: Context) -> Result:
    return _assemble(context, "probe", mma=True)


@registry.case("assembled", "Q·K^T kernel: the expected MMA, no spill", evidence="assembled")
def assemble_qk(context: Context) -> Result:
    return _assemble(context, "qk", mma=True)
