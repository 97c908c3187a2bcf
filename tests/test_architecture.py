"""The house's walls: who may import whom, what an import costs, that public names explain themselves."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for package in ("nbfmha", "ptx_inline") for path in (ROOT / package).rglob("*.py"))
NAMES = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in FILES}
STDLIB = set(sys.stdlib_module_names)
HEAVY = {"numba", "cuda", "torch", "cupy", "matplotlib", "cffi", "ml_dtypes"}
LEAVES = ("nbfmha.bench", "nbfmha.viz", "nbfmha.cli", "nbfmha.testing", "nbfmha.validate", "nbfmha.doctor",
          "nbfmha.tables", "nbfmha.listing", "nbfmha.steady_loop", "nbfmha.support", "nbfmha.ownership", "nbfmha.accuracy",
          "nbfmha.__main__")  # fmt: skip


def imports(path, *, top_level_only=False):
    """Absolute names of what a file imports; ``from a import b`` counts as ``a.b`` where that is a module of ours."""
    tree = ast.parse(path.read_text())
    guarded = {
        inner
        for node in tree.body
        if isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    ours = set(NAMES.values())
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if node in guarded:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in ours else node.module


def within(name, *packages):
    return any(name == package or name.startswith(package + ".") for package in packages)


def modules(*packages):
    return [path for path in FILES if within(NAMES[path], *packages)]


def assert_imports_only(paths, *allowed):
    wrong = [
        (NAMES[path], name)
        for path in paths
        for name in imports(path)
        if name.split(".")[0] not in STDLIB and not within(name, *allowed)
    ]
    assert not wrong, f"allowed: {', '.join(allowed)}; found: {wrong}"


def test_isa_knows_numpy_and_itself():
    assert_imports_only(modules("ptx_inline.isa"), "numpy", "ptx_inline.isa")


def test_ptx_inline_knows_no_attention():
    assert_imports_only(modules("ptx_inline"), "numpy", "numba", "llvmlite", "cuda", "cffi", "ptx_inline")


def test_toolchain_stands_beside_isa():
    beside = ("ptx_inline.compiling", "ptx_inline.types")
    assert_imports_only(modules("ptx_inline.toolchain"), "numba", "cuda", "ptx_inline.toolchain", *beside)
    assert_imports_only(modules(*beside), "numba", *beside)


def test_the_emulator_knows_instructions_alone():
    own = ("ptx_inline.emu", "ptx_inline.isa", "ptx_inline.compiling")
    assert_imports_only(modules("ptx_inline.emu"), "numpy", "numba", "llvmlite", *own)


def test_the_emulator_is_imported_where_it_is_used():
    for path in FILES:
        if not within(NAMES[path], "ptx_inline.emu"):
            found = [name for name in imports(path, top_level_only=True) if within(name, "ptx_inline.emu")]
            assert not found, f"{NAMES[path]} imports {found} at module level"


def test_references_know_no_kernels():
    base = ("nvfp4", "quantized_tensor", "scale_layouts", "validation", "row_scales")
    own = tuple(f"nbfmha.{name}" for name in base)
    paths = modules(*own, "nbfmha.problem", "nbfmha.reference")
    assert len(paths) == 7
    assert_imports_only(paths, "numpy", "ptx_inline.isa", *own, "nbfmha.problem")
    assert len(modules("nbfmha.recipe_model")) == 1
    model = ("nbfmha.problem", "nbfmha.reference", "nbfmha.recipe")
    assert_imports_only(modules("nbfmha.recipe_model"), "numpy", "ptx_inline.isa", *own, *model)
    assert len(modules("nbfmha.kv_layout", "nbfmha.cache_model")) == 2
    assert_imports_only(modules("nbfmha.kv_layout", "nbfmha.cache_model"), "numpy", *own, "nbfmha.kv_layout")


def test_who_owns_which_page_is_known_without_a_gpu():
    assert len(modules("nbfmha.page_pool")) == 1
    assert_imports_only(modules("nbfmha.page_pool"), "numpy", "nbfmha.kv_layout", "nbfmha.validation")


def test_descriptions_know_the_checks_alone():
    paths = modules("nbfmha.problem", "nbfmha.recipe")
    assert len(paths) == 2
    assert_imports_only(paths, "numpy", "nbfmha.validation")


def test_kernels_know_instructions_and_descriptions():
    own = ("scale_layouts", "quantized_tensor", "validation", "gpu_arrays", "problem", "recipe", "tiles", "kv_layout")
    own = (*own, "kernels")
    allowed = ("numpy", "numba", "ptx_inline.device", "ptx_inline.isa", "ptx_inline.toolchain", "ptx_inline.unroll")
    assert_imports_only(modules("nbfmha.kernels"), *allowed, *(f"nbfmha.{name}" for name in own))


def test_nothing_in_the_library_needs_a_leaf():
    for path in modules("nbfmha"):
        if not within(NAMES[path], *LEAVES):
            found = [name for name in imports(path) if within(name, *LEAVES)]
            assert not found, f"{NAMES[path]} imports {found}"


def test_only_one_module_declares_foreign_functions():
    for path in FILES:
        if NAMES[path] != "ptx_inline.device":
            text = path.read_text()
            assert "declare_device" not in text, path
            assert "CUSource(" not in text, path


@pytest.mark.parametrize("path", FILES, ids=[NAMES[path] for path in FILES])
def test_heavy_packages_are_imported_where_they_are_used(path):
    late = ("ptx_inline.device", "ptx_inline.toolchain.shared_functions")
    if NAMES[path] in late or within(NAMES[path], "ptx_inline.emu.simt"):
        return  # imported when a kernel is compiled, and by the emulator when something is emulated
    allowed = {"matplotlib"} if within(NAMES[path], "nbfmha.viz") else set()
    found = {name.split(".")[0] for name in imports(path, top_level_only=True)} & (HEAVY - allowed)
    assert not found, f"{NAMES[path]} imports {found} at module level"


@pytest.mark.parametrize("path", FILES, ids=[NAMES[path] for path in FILES])
def test_public_names_have_docstrings_and_files_are_small(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree), f"{path} has no docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            titled = any("registry.case" in ast.unparse(decorator) for decorator in node.decorator_list)
            assert titled or ast.get_docstring(node), f"{path}:{node.lineno}: {node.name} has no docstring"
    assert text.count("\n") <= 600, f"{path} has more than one duty"


def test_importing_nbfmha_is_cheap():
    code = (
        "import sys, time; start = time.perf_counter(); import nbfmha; seconds = time.perf_counter() - start;"
        f"print(seconds, *sorted({HEAVY!r} & set(sys.modules)))"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    results = [run.stdout.split() for run in runs]
    assert min(float(result[0]) for result in results) < 0.5
    assert results[0][1:] == [], f"import nbfmha also imports {results[0][1:]}"
