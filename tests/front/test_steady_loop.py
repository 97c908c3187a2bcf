"""Counting a loop of machine code: by a made-up listing whose counts are known."""

from nbfmha.steady_loop import SteadyLoop, steady_loop


def listing(*lines: str) -> str:
    return "\n".join(line if line.startswith(".L") else f"        /*0000*/    {line} ;" for line in lines)


LOOP = (
    "MOV R1, R2", ".L_x_0:", "LDSM.16.M88.4 R4, [R2]", "OMMA.SF.16864 R8, R4, R6, R8",
    "@P0 BRA `(.L_x_1)", "FMUL R1, R1, R1", "FMUL R2, R2, R2", ".L_x_1:", "FADD R1, R1, R2",
    "@P1 BRA `(.L_x_2)", "LDGSTS.E [R1], [R2]", ".L_x_2:", "OMMA.SF.16864 R8, R4, R6, R8", "@P2 BRA `(.L_x_0)", "EXIT",
)  # fmt: skip


def test_seldom_parts_are_left_out_and_loads_are_not():
    assert steady_loop(listing(*LOOP)) == SteadyLoop(mma=2, instructions=8, whole=10, longest_span=4)
    assert steady_loop(listing(*LOOP)).others_per_mma == 3


def test_a_condition_may_stand_behind_the_opcode():
    uniform = [line.replace("@P1 BRA", "BRA.U !UP1,") for line in LOOP]
    assert steady_loop(listing(*uniform)) == steady_loop(listing(*LOOP))


def test_the_innermost_loop_counts_and_omma_before_hmma():
    outer = (".L_x_9:", "HMMA.16816.F32 R1, R2, R3, R1", *LOOP[:-1], "@P3 BRA `(.L_x_9)", "EXIT")
    assert steady_loop(listing(*outer)).mma == 2
    halves = (".L_x_7:", *["HMMA.16816.F32 R1, R2, R3, R1"] * 9, "@P3 BRA `(.L_x_7)")
    assert steady_loop(listing(*LOOP[:-1], *halves, "EXIT")).mma == 2
    assert steady_loop(listing(*halves, "EXIT")).mma == 9


def test_no_loop_with_an_mma():
    assert steady_loop(listing("OMMA.SF.16864 R8, R4, R6, R8", ".L_x_0:", "FADD R1, R1, R2", "@P0 BRA `(.L_x_0)")) is None
