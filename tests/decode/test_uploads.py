"""Small tables on a device: made once for a stream, kept for graphs."""

import numpy as np
import pytest

from nbfmha import gpu_arrays
from nbfmha.emulated import Machine
from nbfmha.uploads import Uploads


@pytest.fixture
def uploads():
    return Uploads(Machine("sm_120a").array(np.zeros(8, np.float16)), size=3)


def table(value):
    return lambda: np.array([value], np.int32)


def made_again():
    raise AssertionError("the table is there already")


def test_a_table_is_made_once_and_the_oldest_goes(uploads):
    first = uploads.get("a", table(1))
    assert first.copy_to_host().tolist() == [1]
    uploads.get("b", table(2))
    uploads.get("c", table(3))
    assert uploads.get("a", made_again) is first
    uploads.get("d", table(4))  # "b" was used longest ago
    assert uploads.get("a", made_again) is first
    assert uploads.get("b", table(5)).copy_to_host().tolist() == [5]


def test_another_stream_gets_a_table_of_its_own(uploads, monkeypatch):
    first = uploads.get("a", table(1))
    monkeypatch.setattr(gpu_arrays, "stream_of", lambda array: 7)
    second = uploads.get("a", table(1))
    assert second is not first
    assert uploads.get("a", made_again) is second


def test_tables_of_a_graph_stay(uploads, monkeypatch):
    first = uploads.get("a", table(1))
    with monkeypatch.context() as patch:
        patch.setattr(gpu_arrays, "is_capturing", lambda array: True)
        assert uploads.get("a", made_again) is first
        with pytest.raises(RuntimeError, match="copies a table; make it before the capture"):
            uploads.get("b", table(2))
    for value in range(9):
        uploads.get(value, table(value))
    monkeypatch.setattr(gpu_arrays, "is_capturing", lambda array: True)
    assert uploads.get("a", made_again) is first, "the next graph"
