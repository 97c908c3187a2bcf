"""The registry's mnemonics, targets, PTX versions, formats and selectors, put to NVIDIA's assembler (no GPU, no driver)."""

import pytest

from ptx_inline.isa.instructions import INSTRUCTIONS, Instruction

BLOCK_SCALED = [key for key, found in INSTRUCTIONS.items() if found.sf_vec_size]
#: PTX version that first knows a target; an instruction may be older
FIRST_PTX = {"sm_80": "7.0", "sm_120a": "8.7", "sm_120f": "8.8", "sm_121a": "8.8"}
#: the version just before each that the registry names
PTX_BEFORE = {"7.0": "6.5", "8.7": "8.6"}
SELECTORS = ("byte_id_a", "thread_id_a", "byte_id_b", "thread_id_b")


def as_number(version: str) -> tuple[int, int]:
    major, minor = version.split(".")
    return int(major), int(minor)


@pytest.fixture(scope="module")
def nvjitlink():
    reason = "needs the CUDA wheels: pip install nbfmha[cu13]"
    bindings = pytest.importorskip("cuda.bindings.nvjitlink", reason=reason)
    from cuda.pathfinder import DynamicLibNotFoundError

    try:
        version = tuple(bindings.version())
    except DynamicLibNotFoundError as error:  # the bindings are there, the library they load is not
        pytest.skip(f"{reason} ({error})")
    if version < (13, 1):
        pytest.skip(f"the versions below are known to nvJitLink from 13.1 on, this is {version[0]}.{version[1]}")
    return bindings


@pytest.fixture
def errors(nvjitlink):
    """Function (PTX text, target) -> what the assembler objects to, "" if nothing."""

    def assemble(text: str, target: str) -> str:
        handle = nvjitlink.create(1, [f"-arch={target}"])
        try:
            data = text.encode() + b"\0"
            try:
                nvjitlink.add_data(handle, nvjitlink.InputType.PTX, data, len(data), "test")
                nvjitlink.complete(handle)
            except nvjitlink.nvJitLinkError:
                log = bytearray(nvjitlink.get_error_log_size(handle))
                nvjitlink.get_error_log(handle, log)
                return bytes(log).decode() or "no message"
            return ""
        finally:
            nvjitlink.destroy(handle)

    return assemble


def statement(found: Instruction, name: str, selectors: dict[str, int]) -> str:
    operands = [
        "{" + ", ".join(f"%{operand}{i}" for i in range(found.registers[operand])) + "}" for operand in ("d", "a", "b", "c")
    ]
    if found.sf_vec_size:
        chosen = [selectors.get(selector, 0) for selector in SELECTORS]
        operands += ["%sfa", f"{{{chosen[0]}, {chosen[1]}}}", "%sfb", f"{{{chosen[2]}, {chosen[3]}}}"]
    return f"{name} {', '.join(operands)};"


def module(found: Instruction, version: str, target: str, *, names: list[str] | None = None, **selectors: int) -> str:
    """A kernel of one MMA, or of one for each name."""
    lines = [statement(found, name, selectors) for name in names or [found.mnemonic]]
    return "\n".join(
        (
            f".version {version}",
            f".target {target}",
            ".address_size 64",
            ".visible .entry kernel() {",
            ".reg .b32 %a<4>, %b<2>, %sfa, %sfb;",
            ".reg .f32 %d<4>, %c<4>;",
            *lines,
            "ret;",
            "}",
        )
    )


@pytest.mark.parametrize("key", INSTRUCTIONS)
def test_every_target_named_takes_it(errors, key):
    found = INSTRUCTIONS[key]
    for target in found.min_targets:
        version = max(found.min_ptx, FIRST_PTX[target], key=as_number)
        assert errors(module(found, version, target), target) == ""


@pytest.mark.parametrize("key", INSTRUCTIONS)
def test_no_older_ptx_version_has_it(errors, key):
    found = INSTRUCTIONS[key]
    message = errors(module(found, PTX_BEFORE[found.min_ptx], "sm_80"), "sm_80")
    assert f"requires PTX ISA .version {found.min_ptx} or later" in message


@pytest.mark.parametrize("key", INSTRUCTIONS)
def test_other_targets_reject_it(errors, key):
    found = INSTRUCTIONS[key]
    others = ["sm_75"] if found.min_target == "sm_80" else ["sm_120", "sm_100a", "sm_90a", "sm_89"]
    for target in others:
        message = errors(module(found, "9.1", target), target)
        assert "not supported on .target" in message or "requires .target sm_80" in message, (target, message)


@pytest.mark.parametrize("key", INSTRUCTIONS)
def test_every_mix_of_formats_assembles(errors, key):
    found = INSTRUCTIONS[key]
    names = [
        found.ptx_name(a_format, b_format, sf_format)
        for a_format in found.a_formats
        for b_format in found.b_formats
        for sf_format in found.sf_formats or (None,)
    ]
    assert errors(module(found, "9.1", found.min_target, names=names), found.min_target) == ""


def test_ue8m0_scales_of_16_elements_came_with_ptx_9_1(errors):
    found = INSTRUCTIONS["m16n8k64.mxf4nvf4.4x"]
    assert "9.1" in found.note
    names = [found.ptx_name(sf_format="ue8m0")]
    assert "requires PTX ISA .version 9.1 or later" in errors(module(found, "9.0", "sm_120a", names=names), "sm_120a")


@pytest.mark.parametrize("key", BLOCK_SCALED)
def test_the_assembler_takes_exactly_the_selectors_named(errors, key):
    found = INSTRUCTIONS[key]
    named = (found.byte_ids, found.thread_ids_a, found.byte_ids, found.thread_ids_b)
    for selector, expected in zip(SELECTORS, named, strict=True):
        taken = tuple(i for i in range(5) if not errors(module(found, "9.1", "sm_120a", **{selector: i}), "sm_120a"))
        assert taken == expected, selector


def test_too_few_registers_are_rejected(errors):
    found = INSTRUCTIONS["m16n8k64.mxf4nvf4.4x"]
    text = module(found, "9.1", "sm_120a").replace("{%b0, %b1}", "{%b0}")
    assert "mma" in errors(text, "sm_120a")
