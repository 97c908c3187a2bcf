"""Arguments of a launch, checked before anything reaches the driver; no GPU needed."""

import math

import numpy as np
import pytest

from ptx_inline.toolchain.launcher import ArgumentReader, ProgrammaticLaunch
from ptx_inline.toolchain.parameters import Placeholder

RANGES = {"i32": (-(2**31), 2**31 - 1), "i64": (-(2**63), 2**63 - 1), "u8": (0, 255), "u16": (0, 65535),
          "u32": (0, 2**32 - 1), "u64": (0, 2**64 - 1)}  # fmt: skip


@pytest.mark.parametrize("kind", RANGES)
def test_integers_keep_their_value_or_are_refused(kind):
    reader = ArgumentReader((kind,))
    low, high = RANGES[kind]
    for value in (low, high, 1):
        _, _, (raw,) = reader.read((value,), None)
        assert raw == value
    for value in (low - 1, high + 1):
        with pytest.raises(ValueError, match=rf"argument 0 must be in \[{low}, {high}\] for '{kind}', got {value}"):
            reader.read((value,), None)
    for value in (1.0, "1", None):
        with pytest.raises(TypeError, match=f"argument 0 must be an integer for '{kind}'"):
            reader.read((value,), None)


def test_floats():
    read = ArgumentReader(("f32", "f64")).read
    assert read((1, 0.1), None) == (None, None, [1, 0.1])
    largest = (2 - 2.0**-23) * 2.0**127
    assert read((-largest, 1e300), None)[2] == [-largest, 1e300]
    assert read((1e300, -np.inf), None)[2] == [np.inf, -np.inf], "as C rounds it"
    assert all(map(math.isnan, read((np.float64("nan"), math.nan), None)[2]))
    with pytest.raises(TypeError, match="argument 1 must be a number for 'f64', got str"):
        read((1, "2"), None)
    for kind in ("f32", "f64"):
        with pytest.raises(OverflowError):
            ArgumentReader((kind,)).read((10**400,), None)


def test_what_is_fixed_is_checked_and_placeholders_stay():
    reader = ArgumentReader(("u8*", "i32", "f32*"))
    late = Placeholder(0)
    assert reader.read_fixed((4096, 7, late)) == (None, [4096, 7, late])
    with pytest.raises(ValueError, match=r"argument 1 must be in \[-2147483648, 2147483647\] for 'i32', got 2147483648"):
        reader.read_fixed((late, 2**31, late))
    with pytest.raises(TypeError, match="the kernel takes 3 arguments, got 2"):
        reader.read_fixed((late, 7))


def test_addresses_pass_and_what_is_no_gpu_array_does_not():
    reader = ArgumentReader(("u8*", "i32"))
    assert reader.read((4096, 7), 5)[2][0] == 4096
    assert reader.read((4096, 7), 5)[:2] == (None, 5)
    for wrong in (np.zeros(3), [1], "x", None):
        with pytest.raises(TypeError, match=r"pointer argument must be an address \(int\), a torch tensor or an array"):
            reader.read((wrong, 7), None)
    with pytest.raises(TypeError, match="the kernel takes 2 arguments, got 1"):
        reader.read((4096,), None)


class FakeTensor:
    """As much of a torch tensor as a launch reads."""

    def __init__(self, address, device):
        self.data_ptr = lambda: address
        self.get_device = lambda: device


class FakeTorch:
    """As much of torch as a launch asks for: the current stream of device d is 100 + d."""

    Tensor = FakeTensor

    class _C:
        @staticmethod
        def _cuda_getCurrentRawStream(device):
            return 100 + device


def test_torch_tensors_give_device_and_stream(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", FakeTorch)
    reader = ArgumentReader(("u8*", "u8*"))
    assert reader.read((FakeTensor(1, 2), FakeTensor(3, 2)), None) == (2, 102, [1, 3])
    assert reader.read((FakeTensor(1, 2), 3), 9) == (2, 9, [1, 3])
    with pytest.raises(ValueError, match="argument 1 must be on device 2 like those before it, got 0"):
        reader.read((FakeTensor(1, 2), FakeTensor(3, 0)), None)
    with pytest.raises(ValueError, match="argument 0 must be in GPU memory, got a CPU tensor"):
        reader.read((FakeTensor(1, -1), 3), None)


def test_programmatic_launches_say_so_and_keep_streams_apart():
    driver = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    launched = []

    class Driver:
        def __getattr__(self, name):
            return getattr(driver, name)

        def cuLaunchKernelEx(self, config, function, addresses, extra):
            launched.append((config, function, addresses, extra))
            return ("answer",)

    launch = ProgrammaticLaunch(Driver(), driver.CUfunction(8), (2, 3, 4), (64, 1, 1), 1024)
    assert [launch(stream, 4096, 0) for stream in (7, 9, 7)] == [("answer",)] * 3
    assert launch.args[-1] == 1024
    configs = [config for config, *_ in launched]
    assert [int(config.hStream) for config in configs] == [7, 9, 7]
    assert configs[0] is configs[2], "made once for a stream"
    for config, function, addresses, extra in launched:
        assert (int(function), addresses, extra) == (8, 4096, 0)
        assert (config.gridDimX, config.gridDimY, config.gridDimZ) == (2, 3, 4)
        assert (config.blockDimX, config.blockDimY, config.blockDimZ) == (64, 1, 1)
        assert (config.sharedMemBytes, config.numAttrs) == (1024, 1)
        attribute = config.attrs[0]
        assert attribute.id == driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        assert attribute.value.programmaticStreamSerializationAllowed == 1
    for stream in range(200):
        launch(stream, 4096, 0)
    assert [int(config.hStream) for config, *_ in launched[3:]] == list(range(200))
