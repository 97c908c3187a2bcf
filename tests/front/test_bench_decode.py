"""The decode benchmark: bytes counted, what a row says of its peers, the table, the report, what it refuses; inputs on
which a kernel that loses keys cannot pass."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from nbfmha import kv_layout
from nbfmha.bench import compare, decode, measure
from nbfmha.cli import app

SMALL = decode.Shape(8, 16, 4, 256, 64)


def no_gpu():
    raise RuntimeError("no GPU in this test")


def run(*arguments):
    return CliRunner().invoke(app, ["bench", *arguments])


def test_shapes_and_their_bytes():
    assert len(set(decode.SHAPES)) == 5
    for shape in decode.SHAPES:
        assert shape.heads % shape.heads_kv == 0
        layout = kv_layout.CacheLayout(shape.heads_kv, shape.head_dim)
        tokens = shape.batch * shape.length
        assert shape.elements * decode.OUR_BITS / 8 == tokens * layout.bytes_per_token
        assert shape.elements * decode.PEER_BITS / 8 == tokens * 2 * shape.heads_kv * shape.head_dim * 2
    assert decode.SHAPES[0].title == "1, 32/8, 32768, 128"


@pytest.mark.parametrize("shape", [*decode.SHAPES, SMALL], ids=lambda shape: shape.title)
@pytest.mark.parametrize("l2", [6 << 20, 50 << 20, 9 * 8 * 4 * 256 * 64 // 8])
def test_sets_exceed_l2_four_times(shape, l2):
    torch = SimpleNamespace(cuda=SimpleNamespace(get_device_properties=lambda index: SimpleNamespace(L2_cache_size=l2)))
    sets, bytes_ = decode.sets_of(torch, shape), shape.elements * 4.5 / 8
    assert (sets - 1) * bytes_ <= 4 * l2 < sets * bytes_


@pytest.mark.parametrize("sets", [1, 2, 7])
@pytest.mark.parametrize("shape", decode.SHAPES, ids=lambda shape: shape.title)
def test_a_graph_reads_1_gb_and_every_set_as_often(shape, sets):
    order, bytes_ = decode.order_of(shape, sets), shape.elements * 4.5 / 8
    assert order == list(range(sets)) * (len(order) // sets)
    assert (len(order) - sets) * bytes_ < 1e9 <= len(order) * bytes_


def row(shape, name, graph_us, fastest_peer_us=50.0, **more):
    bits = decode.OUR_BITS if name in decode.CACHES else decode.PEER_BITS
    return decode.Row(shape, name, 8, graph_us, graph_us + 2.54, 2 * graph_us, bits, 3.0, fastest_peer_us, 0.07, **more)


def test_a_row_compares():
    one = row(SMALL, decode.OURS, 20.0)
    assert one.tb_s == pytest.approx(2 * 8 * 4 * 256 * 64 * 4.5 / 8 / 20e-6 / 1e12)
    assert one.share_of_copy == pytest.approx(one.tb_s / 3)
    assert one.times_peer == 2.5
    peer = row(SMALL, decode.FLASH, 50.0)
    assert peer.times_peer == 1
    # who reads 4.5 bits for 16 has the speed of its bandwidth times what it spares
    assert one.times_peer == pytest.approx(one.tb_s / peer.tb_s * 16 / 4.5)


def report():
    first, second = decode.SHAPES[:2]
    rows = [row(first, decode.OURS, 20.0, host_us=90.04), row(first, compare.CUDNN, 50.0)]
    rows.append(row(second, decode.OURS, 25.0))
    rows[2] = replace(rows[2], copy_tb_s=2.9)
    return decode.Report({"gpu": "some GPU"}, rows, decode.Append(7.96, 66.2))


def test_the_table_has_a_section_a_shape():
    console = measure.console()
    with console.capture() as capture:
        console.print(decode.table(report()))
    text = capture.get()
    assert "on some GPU; copy 2.90 to 3.00 TB/s" in text
    assert "append a token to 64 sequences (8 heads, 128): 8.0 us, host 66.2" in text
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    assert [line[0] for line in lines] == ["1, 32/8, 32768, 128", "", "16, 32/8, 8192, 128"]
    first = report().rows[0]
    figures = [f"{first.tb_s:.2f}", f"{first.share_of_copy:.0%}", "2.50", "0.0700"]
    assert lines[0][1:] == [decode.OURS, "20.0", "22.5", "40.0", "90.0", *figures]
    assert lines[1][1:6] == [compare.CUDNN, "50.0", "52.5", "100.0", "-"]
    assert text.count("├") == 1


def test_a_report_is_read_as_it_was_written(tmp_path):
    measure.write_json(tmp_path / "x.json", report().as_json())
    written = json.loads((tmp_path / "x.json").read_text())
    assert decode.Report.of_json(written) == report()
    assert written["rows"][0]["times_peer"] == 2.5
    assert written["append"]["sequences"] == decode.APPEND_SEQUENCES
    del written["rows"][0]["graph_us"]
    with pytest.raises(KeyError, match="graph_us"):
        decode.Report.of_json(written)


def test_the_shipped_report_is_a_whole_run():
    shipped = decode.shipped_report()
    assert tuple(dict.fromkeys(row.shape for row in shipped.rows)) == decode.SHAPES
    assert "H200" in shipped.machine["gpu"]
    for shape in decode.SHAPES:
        rows = {row.name: row for row in shipped.rows if row.shape == shape}
        assert {*decode.CACHES, decode.FLASH} <= set(rows)
        peers = [row.graph_us for name, row in rows.items() if name not in decode.CACHES]
        assert {row.fastest_peer_us for row in rows.values()} == {min(peers)}
        for name, own in rows.items():
            ours = name in decode.CACHES
            assert own.relative_l2 < (decode.RELATIVE_L2_BOUND if ours else compare.PEER_BOUND)
            assert own.bits == (decode.OUR_BITS if ours else decode.PEER_BITS)
        assert all(0 < row.share_of_copy < 1.2 for row in rows.values())


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(measure, "require_gpu", no_gpu)
    result = run("decode")
    assert (result.exit_code, result.stderr.strip()) == (2, "error: no GPU in this test")


def test_recipes_belong_to_prefill():
    result = run("decode", "--recipes", "fast")
    assert result.exit_code == 2
    assert "--recipes belongs to the benchmark prefill, got 'decode'" in result.stderr


def test_a_peer_without_a_kernel_is_left_out_and_one_without_memory_is_not():
    class OutOfMemoryError(RuntimeError):  # as torch's is one
        pass

    def fails(error):
        raise error

    assert compare.runs_here(lambda: None)
    assert not compare.runs_here(lambda: fails(RuntimeError("No available kernel. Aborting execution.")))
    with pytest.raises(OutOfMemoryError):
        compare.runs_here(lambda: fails(OutOfMemoryError()))


@pytest.mark.parametrize("error", [0.25, float("nan"), float("inf")])
def test_what_is_not_below_the_bound_is_named(error):
    compare.check_below(0.2499, 0.25, "x")
    with pytest.raises(AssertionError, match=r"^x: relative L2 of a head is .*, must be below 0\.25"):
        compare.check_below(error, 0.25, "x")


class TestTheBound:
    """It parts right from wrong, on the benchmark's own inputs."""

    @pytest.fixture
    def inputs(self, torch):
        """torch's q, k, v of one set, and the same in float64."""
        given = [x[0] for x in decode.make_inputs(torch, SMALL, 1, "cpu")]
        return given, [x.double().numpy() for x in given]

    @staticmethod
    def attention(q, k, v):
        """float64 (batch, heads, 1, head_dim)."""
        from nbfmha import reference

        return reference.attention(q[:, :, None], k, v)

    def test_what_outputs_are_compared_with_is_attention(self, torch, inputs):
        given, exact = inputs
        expected = torch.from_numpy(self.attention(*exact))
        assert compare.worst_head(torch, decode._expected(torch, *given), expected) < 1e-5

    @pytest.mark.parametrize("quantise_q", [False, True], ids=["q as it is", "q in NVFP4"])
    def test_nvfp4_stays_below(self, torch, inputs, quantise_q):
        """All but the newest tokens in pages; with q as each of the implementations reads it."""
        import ml_dtypes

        from nbfmha import cache_model, nvfp4

        (q, k, v), exact = inputs
        layout = kv_layout.CacheLayout(4, 64, dtype="bfloat16", recent_tokens=16, sink_tokens=0)
        q = q.float().numpy()
        in_pages = nvfp4.dequantize(nvfp4.quantize(q, scale="four_over_six")) if quantise_q else q
        k, v = (x.float().numpy().astype(ml_dtypes.bfloat16) for x in (k, v))
        held = [cache_model.contents(*kv, layout, [SMALL.length]) for kv in zip(k, v, strict=True)]
        out = self.attention(in_pages, np.stack([own.k for own in held]), np.stack([own.v for own in held]))
        expected = torch.from_numpy(self.attention(*exact))
        error = compare.worst_head(torch, torch.from_numpy(out), expected)
        assert 0.05 < error < 0.7 * decode.RELATIVE_L2_BOUND

    def test_wrong_kernels_do_not(self, torch, inputs):
        _, (q, k, v) = inputs
        expected = self.attention(q, k, v)
        token = np.arange(SMALL.length)

        def lost(first, stop):
            kept = (token < first) | (token >= stop)
            return self.attention(q, k[:, :, kept], v[:, :, kept])

        wrong = {
            "weights uniform": self.attention(0 * q, k, v),
            "heads exchanged": expected[:, ::-1],
            "sequences exchanged": self.attention(q, k[::-1], v[::-1]),
            "values a token late": self.attention(q, k, np.roll(v, 1, axis=2)),
            "values a block late": self.attention(q, k, np.roll(v, 16, axis=2)),
            "softmax_scale forgotten": self.attention(8 * q, k, v),
            **{f"tokens {i} to {i + 31} lost": lost(i, i + 32) for i in range(0, SMALL.length, 32)},
        }
        for name, out in wrong.items():
            out = torch.from_numpy(np.ascontiguousarray(out))
            assert compare.worst_head(torch, out, torch.from_numpy(expected)) > 2 * decode.RELATIVE_L2_BOUND, name
        nothing = torch.full(expected.shape, torch.nan)
        assert not compare.worst_head(torch, nothing, torch.from_numpy(expected)) < decode.RELATIVE_L2_BOUND


@pytest.fixture
def plain_gpu(gpu):
    """Without the poison: torch refuses cuBLAS and cuDNN with it; the benchmark poisons by itself what ours writes."""
    gpu.use_deterministic_algorithms(False)
    return gpu


@pytest.mark.gpu
@pytest.mark.parametrize("heads_kv", [2, 4])
def test_on_a_gpu_a_small_shape_is_checked_and_timed(plain_gpu, monkeypatch, heads_kv):
    monkeypatch.setattr(decode, "sets_of", lambda torch, shape: 3)
    monkeypatch.setattr(decode, "COPY_BYTES", 1 << 24)
    monkeypatch.setattr(decode, "GRAPH_BYTES", 1 << 20)
    rows = decode.time_shape(plain_gpu, decode.Shape(2, 4, heads_kv, 500, 64), rounds=1)
    packed = [decode.FLASH_PACKED] if heads_kv < 4 else []
    assert [row.name for row in rows if row.name != decode.CUDNN] == [*decode.CACHES, decode.FLASH, *packed]
    ours = [row for row in rows if row.name in decode.CACHES]
    assert all(0.01 < row.relative_l2 < decode.RELATIVE_L2_BOUND and row.host_us > 0 for row in ours)
    assert all(row.graph_us > 0 and row.behind_us > 0 and row.eager_us > 0 and row.copy_tb_s > 0 for row in rows)
    assert all(row.host_us is None and row.relative_l2 < compare.PEER_BOUND for row in rows[len(ours) :])
    assert {row.calls for row in rows} == {9 if heads_kv == 2 else 6}, "1 MiB of three sets of 422 or 844 KiB"
    assert not plain_gpu.are_deterministic_algorithms_enabled(), "the setting is left as it was"


@pytest.mark.gpu
def test_on_a_gpu_a_wrong_output_stops_it(plain_gpu, monkeypatch):
    import nbfmha

    right = nbfmha.decode
    monkeypatch.setattr(nbfmha, "decode", lambda *arguments, **options: right(*arguments, **options).roll(1, dims=2))
    with pytest.raises(AssertionError, match=r"nbfmha, batch, heads, length, head_dim = 2, 4/2, 300, 64: .*below 0\.25"):
        decode.check(plain_gpu, decode.Shape(2, 4, 2, 300, 64), 1)


@pytest.mark.gpu
def test_on_a_gpu_appending_is_timed(plain_gpu):
    append = decode.time_append(plain_gpu, rounds=1)
    assert append.gpu_us > 0
    assert append.host_us > 0
