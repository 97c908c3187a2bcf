"""Fixtures of all tests. Nothing here asks for a GPU at import."""

import gc

import pytest


@pytest.fixture
def torch():
    """The torch module, for tests that need no GPU."""
    return pytest.importorskip("torch", reason="torch is not installed; it is no dependency of this package")


@pytest.fixture
def gpu(torch):
    """torch on a GPU, with every uninitialised allocation poisoned; skipped where there is none."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU here: torch.cuda.is_available() is false")
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN, or the largest integer
    yield torch
    torch.cuda.synchronize()
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def cache_directory(tmp_path, monkeypatch):
    """A kernel cache of the test's own."""
    monkeypatch.setenv("NBFMHA_CACHE_DIR", str(tmp_path / "kernels"))
    yield tmp_path / "kernels"
    gc.collect()
