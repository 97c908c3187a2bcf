"""The cache of cubins and PTX: what makes a key, what a damaged entry does, several processes, no Numba on a hit."""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ptx_inline.toolchain import Kernel, cache, cache_directory
from ptx_inline.toolchain import kernel as kernel_module
from ptx_inline.toolchain.compiler import entry_name

TARGET = "sm_90a"


def make_fill(value):
    """Kernel ``fill(y)``."""

    def fill(y):
        y[0] = value

    return fill


def make_other(value):
    """Another factory with the same kernel."""

    def fill(y):
        y[0] = value

    return fill


def entries(directory):
    return sorted(path.name for path in directory.glob("*")) if directory.exists() else []


def fill(value=1, factory=make_fill, pointer="i32*", **options):
    return Kernel(factory, (pointer,), {"value": value}, **options)


def test_a_second_kernel_object_finds_the_entry(cache_directory, monkeypatch):
    first = fill().cubin(TARGET)
    assert len(entries(cache_directory)) == 1
    monkeypatch.setattr(Kernel, "ltoir", lambda *_: pytest.fail("compiled although the entry is there"))
    again = fill()
    assert again.cubin(TARGET) == first
    assert again.resources(TARGET).registers > 0


def test_a_second_kernel_object_finds_the_ptx(cache_directory, monkeypatch):
    first = fill().ptx(TARGET)
    assert first.startswith("//")
    assert ".visible .entry" in first
    assert [Path(name).suffix for name in entries(cache_directory)] == [".ptx"]
    monkeypatch.setattr(Kernel, "ltoir", lambda *_: pytest.fail("compiled although the entry is there"))
    again = fill()
    assert again.ptx(TARGET) == first
    shutil.rmtree(cache_directory)
    assert again.ptx(TARGET) is again.ptx(TARGET)  # and keeps it in memory


def test_ptx_and_cubin_are_entries_with_keys_of_their_own(cache_directory):
    kernel = fill()
    kernel.ptx(TARGET)
    kernel.cubin(TARGET)
    ptx, cubin = sorted(cache_directory.iterdir(), key=lambda path: path.suffix, reverse=True)
    assert (ptx.suffix, cubin.suffix) == (".ptx", ".cubin")
    assert ptx.stem != cubin.stem


@pytest.mark.parametrize("output", ["cubin", "ptx"])
def test_everything_that_matters_is_in_the_key(cache_directory, output):
    getattr(fill(), output)(TARGET)
    for other, target in (
        (fill(value=2), TARGET),
        (fill(factory=make_other), TARGET),
        (fill(pointer="f32*"), TARGET),
        (fill(launch_bounds=(64,)), TARGET),
        (fill(), "sm_80"),
    ):
        before = len(entries(cache_directory))
        getattr(other, output)(target)
        assert len(entries(cache_directory)) == before + 1


@pytest.mark.parametrize("output", ["cubin", "ptx"])
@pytest.mark.parametrize("changed", ["snippets/arith.cu", "device.py", "toolchain/compiler.py"])
def test_a_changed_snippet_or_compiler_makes_another_entry(cache_directory, tmp_path, monkeypatch, output, changed):
    package = tmp_path / "ptx_inline"
    shutil.copytree(kernel_module._PACKAGE, package, ignore=shutil.ignore_patterns("emu", "isa", "__pycache__"))
    monkeypatch.setattr(kernel_module, "_PACKAGE", package)
    monkeypatch.setattr(kernel_module, "_COMPILER", package / "toolchain")
    for number in (1, 2):
        kernel_module._source_digest.cache_clear()  # as a new process
        getattr(fill(), output)(TARGET)
        assert len(entries(cache_directory)) == number
        with open(package / changed, "a") as file:
            file.write("\n")
    kernel_module._source_digest.cache_clear()


def test_toolchain_versions_are_in_the_key(monkeypatch):
    key = cache.key("a")
    assert cache.key("a") == key
    assert any(version.startswith("numba-cuda 0.") for version in cache.toolchain_versions())
    monkeypatch.setattr(cache, "toolchain_versions", lambda: ("numba-cuda 99",))
    assert cache.key("a") != key


DAMAGES = {
    "truncate": lambda content: content[: len(content) // 2],
    "flip": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "no header": lambda content: content.split(b"\n", 1)[1],
    "not json": lambda content: b"{\n" + content,
    "empty": lambda content: b"",
    "other fields": lambda content: b'{"sha256": "00"}\n' + content,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_compiled_again_and_rewritten(cache_directory, caplog, damage):
    fill().cubin(TARGET)
    (path,) = cache_directory.glob("*.cubin")
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with caplog.at_level(logging.WARNING, "ptx_inline"):
        made_again = fill().cubin(TARGET)
    assert "damaged cache entry" in caplog.text
    assert cache.load(path.stem)[0] == made_again  # Numba numbers its names: not the same bytes as before
    assert entry_name(made_again) == cache.load(path.stem)[1]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_ptx_is_compiled_again_and_rewritten(cache_directory, caplog, damage):
    fill().ptx(TARGET)
    (path,) = cache_directory.glob("*.ptx")
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with caplog.at_level(logging.WARNING, "ptx_inline"):
        made_again = fill().ptx(TARGET)
    assert "damaged cache entry" in caplog.text
    assert cache.load_ptx(path.stem) == made_again


def test_a_directory_that_cannot_be_used_is_logged_and_survived(tmp_path, monkeypatch, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("NBFMHA_CACHE_DIR", str(blocked / "below"))
    with caplog.at_level(logging.WARNING, "ptx_inline"):
        assert fill().cubin(TARGET)
        assert fill().ptx(TARGET)
    assert caplog.text.count(f"kernel cache {blocked / 'below'} is not usable") == 2


def test_where_the_cache_lies(monkeypatch):
    monkeypatch.setenv("NBFMHA_CACHE_DIR", "~/somewhere")
    assert cache_directory() == Path.home() / "somewhere"
    monkeypatch.delenv("NBFMHA_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", os.path.join(os.sep, "xdg"))
    assert cache_directory() == Path(os.sep, "xdg", "nbfmha")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path.home() / ".cache" / "nbfmha"


WRITE_AND_READ = """
import sys
from ptx_inline.toolchain import Resources, cache
resources = Resources(8, 0, 0, 0, 0)
for turn in range(200):
    cubin = bytes([int(sys.argv[1])]) * 50_000
    cache.store("shared", cubin, "name", resources)
    found = cache.load("shared")
    assert found is not None, "a damaged or missing entry was seen"
    assert len(set(found[0])) == 1 and len(found[0]) == 50_000
"""


def test_processes_that_write_one_entry_at_once(cache_directory):
    environment = {**os.environ, "NBFMHA_CACHE_DIR": str(cache_directory)}
    runs = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", WRITE_AND_READ, str(number)], env=environment)
        for number in range(3)
    ]
    assert [run.wait(timeout=120) for run in runs] == [0, 0, 0]
    assert entries(cache_directory) == ["shared.cubin"], "temporary files were left behind"


FROM_CACHE = """
import sys
from nbfmha.kernels.catalogue import kernel
getattr(kernel("probe", "sm_120a"), sys.argv[1])("sm_120a")
print("numba" in sys.modules)
"""


@pytest.mark.parametrize("output", ["cubin", "ptx"])
def test_a_process_that_finds_its_entry_never_imports_numba(cache_directory, output):
    environment = {**os.environ, "NBFMHA_CACHE_DIR": str(cache_directory)}
    command = [sys.executable, "-c", FROM_CACHE, output]
    answers = [subprocess.run(command, env=environment, capture_output=True, text=True, check=True) for _ in range(2)]
    assert [answer.stdout.strip() for answer in answers] == ["True", "False"]
