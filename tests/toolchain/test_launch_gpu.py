"""Launches on a GPU: whose arrays, which stream and device, graph capture, large shared memory."""

import threading

import numpy as np
import pytest

from ptx_inline.toolchain import Kernel
from ptx_inline.toolchain.parameters import Placeholder

pytestmark = pytest.mark.gpu


def make_add_one():
    from numba import cuda

    def add_one(x, y, n):
        i = cuda.grid(1)
        if i < n:
            y[i] = x[i] + 1

    return add_one


def make_shared(words):
    """Writes shared memory from one end and reads it from the other."""
    from numba import cuda
    from numba.core import types

    def shared(y):
        smem = cuda.shared.array(0, types.int32)
        for i in range(cuda.threadIdx.x, words, cuda.blockDim.x):
            smem[i] = 3 * i
        cuda.syncthreads()
        for i in range(cuda.threadIdx.x, words, cuda.blockDim.x):
            y[i] = smem[words - 1 - i]

    return shared


def make_reversed():
    """Each CTA reads what another one of the kernel before has written."""
    from numba import cuda

    from ptx_inline import device as dev

    def reversed_plus_one(x, y, n):
        dev.griddepcontrol_launch_dependents()
        dev.griddepcontrol_wait()
        i = cuda.grid(1)
        if i < n:
            y[i] = x[n - 1 - i] + 1

    return reversed_plus_one


ADD_ONE = Kernel(make_add_one, ("i32*", "i32*", "i32"))
REVERSED = Kernel(make_reversed, ("i32*", "i32*", "i32"), programmatic=True)


def launch(x, y, n=1000, **options):
    ADD_ONE.launch((4,), (256,), (x, y, n), **options)


def test_torch_tensors_on_the_current_stream(gpu):
    x = gpu.arange(1000, dtype=gpu.int32, device="cuda")
    y = gpu.empty_like(x)
    x.add_(0)  # torch's kernel and ours are compiled and loaded here, which could outlast the wait below
    launch(x, y)
    gpu.cuda.synchronize()
    stream = gpu.cuda.Stream()
    with gpu.cuda.stream(stream):
        gpu.cuda._sleep(400_000_000)  # 0.2 s, behind which the launch must wait
        x.add_(5)
        launch(x, y)
        finished = stream.record_event()
    assert not finished.query(), "the launch went to another stream"
    stream.synchronize()
    assert gpu.equal(y, gpu.arange(1000, dtype=gpu.int32, device="cuda") + 6)


def test_an_explicit_stream(gpu):
    x = gpu.arange(1000, dtype=gpu.int32, device="cuda")
    y = gpu.empty_like(x)
    gpu.cuda.synchronize()
    stream = gpu.cuda.Stream()
    launch(x, y, stream=stream.cuda_stream)
    stream.synchronize()
    assert gpu.equal(y, x + 1)


def test_addresses_numba_and_cupy_arrays(gpu):
    from numba import cuda

    x = np.arange(1000, dtype=np.int32)
    source, target = cuda.to_device(x), cuda.device_array(1000, np.int32)
    launch(source, target)
    np.testing.assert_array_equal(target.copy_to_host(), x + 1)
    y = gpu.empty(1000, dtype=gpu.int32, device="cuda")
    launch(gpu.from_numpy(x).cuda().data_ptr(), y.data_ptr(), stream=0)
    gpu.cuda.synchronize()
    np.testing.assert_array_equal(y.cpu().numpy(), x + 1)
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed; it is no dependency of this package")
    target = cupy.empty(1000, np.int32)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        launch(cupy.asarray(x), target)
        stream.synchronize()
    np.testing.assert_array_equal(target.get(), x + 1)


def test_graph_capture_and_replay(gpu):
    x, y = (gpu.zeros(1000, dtype=gpu.int32, device="cuda") for _ in range(2))
    launch(x, y)  # loads the code
    gpu.cuda.synchronize()
    graph = gpu.cuda.CUDAGraph()
    with gpu.cuda.graph(graph):
        for _ in range(5):
            launch(x, y)
            launch(y, x)
    x.zero_()
    for replay in range(1, 4):
        graph.replay()
        gpu.cuda.synchronize()
        assert int(x[0]) == 10 * replay


def test_programmatic_launches_wait_for_what_they_read(gpu):
    n = 1 << 16
    x = gpu.arange(n, dtype=gpu.int32, device="cuda")
    y, expected = gpu.empty_like(x), x + 104

    def chain():
        for _ in range(50):
            REVERSED.launch((n // 64,), (64,), (x, y, n))
            REVERSED.launch((n // 64,), (64,), (y, x, n))
        x.add_(2)  # a kernel of another library, before and after ours
        REVERSED.launch((n // 64,), (64,), (x, y, n))
        REVERSED.launch((n // 64,), (64,), (y, x, n))

    chain()
    assert gpu.equal(x, expected)
    graph = gpu.cuda.CUDAGraph()
    with gpu.cuda.graph(graph):
        chain()
    for replay in range(1, 4):
        graph.replay()
        assert gpu.equal(x, expected + 104 * replay)


def test_more_shared_memory_than_48_kib(gpu):
    for kib in (16, 64, 160):
        words = kib * 256
        y = gpu.empty(words, dtype=gpu.int32, device="cuda")
        Kernel(make_shared, ("i32*",), {"words": words}).launch((1,), (256,), (y,), smem_bytes=kib * 1024)
        assert gpu.equal(y.cpu(), 3 * gpu.arange(words - 1, -1, -1, dtype=gpu.int32))
    with pytest.raises(ValueError, match="smem_bytes must be at most"):
        Kernel(make_shared, ("i32*",), {"words": 1}).launch((1,), (256,), (y,), smem_bytes=1 << 20)


def test_a_prepared_launch(gpu):
    x, z = gpu.arange(1000, dtype=gpu.int32, device="cuda"), gpu.zeros(1000, dtype=gpu.int32, device="cuda")
    queue = ADD_ONE.prepare(0, (4,), (256,), (Placeholder(1), Placeholder(0), 1000), 2)
    from_x = ADD_ONE.prepare(0, (4,), (256,), (x, Placeholder(0), 500), 1)
    stream = gpu.cuda.current_stream().cuda_stream
    y = gpu.empty_like(x)
    queue((y.data_ptr(), x.data_ptr()), stream)
    from_x((z.data_ptr(),), stream)
    assert gpu.equal(y, x + 1)
    assert gpu.equal(z[:500], x[:500] + 1)
    assert not z[500:].any()
    with pytest.raises(ValueError, match="arguments must be on device 1, got arrays on device 0"):
        ADD_ONE.prepare(1, (4,), (256,), (x, Placeholder(0), 1000), 1)


def test_many_threads_launch_one_kernel(gpu):
    """Arguments of one launch are nobody else's while the driver reads them."""
    x = gpu.arange(1000, dtype=gpu.int32, device="cuda")
    results = [gpu.zeros(64, 1000, dtype=gpu.int32, device="cuda") for _ in range(8)]
    launch(x, results[0][0])
    gpu.cuda.synchronize()
    stream = gpu.cuda.current_stream().cuda_stream

    def run(rows):
        for i, row in enumerate(rows):
            launch(x[i:], row, 1000 - i, stream=stream)

    threads = [threading.Thread(target=run, args=(rows,)) for rows in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gpu.cuda.synchronize()
    for rows in results:
        for i, row in enumerate(rows):
            assert gpu.equal(row[: 1000 - i], x[i:] + 1)


def test_what_the_driver_refuses_is_an_error(gpu):
    x = gpu.arange(1000, dtype=gpu.int32, device="cuda")
    with pytest.raises(RuntimeError, match="the launch was answered CUDA_ERROR_INVALID_VALUE"):
        ADD_ONE.launch((4,), (4096,), (x, x, 1000))
    launch(x, x)  # nothing is left of it
    gpu.cuda.synchronize()


def test_a_thread_without_a_context(gpu):
    x = gpu.arange(1000, dtype=gpu.int32, device="cuda")
    y = gpu.empty_like(x)
    gpu.cuda.synchronize()
    failures = []

    def run():
        try:
            launch(x.data_ptr(), y.data_ptr(), stream=0)
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    gpu.cuda.synchronize()
    assert not failures
    assert gpu.equal(y, x + 1)


def test_arguments_that_do_not_fit_are_refused(gpu):
    x = gpu.arange(1000, dtype=gpu.int32, device="cuda")
    with pytest.raises(ValueError, match=r"argument 1 must be in GPU memory, got a CPU tensor"):
        launch(x, x.cpu())
    with pytest.raises(ValueError, match=r"argument 2 must be in \[-2147483648, 2147483647\] for 'i32', got 2147483648"):
        launch(x, x, 2**31)
    with pytest.raises(TypeError, match="the kernel takes 3 arguments, got 2"):
        ADD_ONE.launch((1,), (32,), (x, x))
    with pytest.raises(TypeError, match="pointer argument must be an address"):
        launch(x, "y")


def test_quantising_is_captured_in_a_graph(gpu):
    import nbfmha

    x = gpu.randn(2, 64, 64, device="cuda", dtype=gpu.float16)
    expected = nbfmha.quantize(x, global_scale="amax")
    graph = gpu.cuda.CUDAGraph()
    with gpu.cuda.graph(graph):
        qt = nbfmha.quantize(x, global_scale="amax")
        back = nbfmha.dequantize(qt, "float16")
    graph.replay()
    gpu.cuda.synchronize()
    assert gpu.equal(qt.codes, expected.codes)
    assert gpu.equal(back, nbfmha.dequantize(expected, "float16"))
