"""``nbfmha bench decode``: one query token of each sequence on a paged NVFP4 KV cache, beside torch's FlashAttention and
cuDNN on the same keys and values in bfloat16, in turn in one process.

Rows are timed three times: as replays of a CUDA graph, in which calls follow one another without the host; the same with a
small kernel of torch's ahead of every call, which counts with it; and called from Python. Ours begin while the kernel ahead
of them still runs, on sm_90 and newer: among themselves they use each other's end, behind another kernel that one's. Every
call of a run reads another set of sequences, as a model's layers do, so that nothing is in L2 when it is read: sets until
they exceed L2 four times. A graph has calls of all sets in turn until they have read 1 GB of NVFP4, as one of a decode step
has those of all layers; what is between two graphs, 3 us on an H200, is then 1 % of them or less. Bandwidth counts 4.5 bits
for every element of K and V (16 for the peers) and nothing else; the ceiling is torch's copy of 1 GiB, bytes read plus
bytes written, in the same rounds.

Ours runs on two caches, see ``CACHES``. The peers get contiguous K and V. FlashAttention runs twice: with torch's
``enable_gqa``, and with the heads that share K and V as so many queries of one head, which reads K and V once; the faster
counts. Every output is compared with float32 attention before anything is timed, head by head; memory that ours must write
holds NaN before. The queries of the inputs look for one key among all: losing keys costs far more than the quantisation
error that is allowed.

Appending is timed by itself: a token to each of 64 sequences, mean of 16 in a row, since every 16th quantises a block.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from nbfmha.bench import measure
from nbfmha.bench.compare import CUDNN, FLASH, PEER_BOUND, check_below, poisoned, runs_here, worst_head

OURS, OURS_NARROW, FLASH_PACKED = "nbfmha", "nbfmha, windows 64 + 16", f"{FLASH}, heads packed"
CACHES: dict[str, dict[str, int]] = {OURS: {}, OURS_NARROW: {"recent_tokens": 64, "sink_tokens": 16}}
"""Name of a run of ours -> windows of its cache: the default ones, and half of them, which cost less time and more of the
quality (README)."""
OUR_BITS, PEER_BITS = 4.5, 16
"""Of an element of K and V."""
COPY_BYTES = 1 << 30
RELATIVE_L2_BOUND = 0.25
"""Of each head against float32 attention. A head is one row here: most are at 0.1, the worst of thousands at 0.16; uniform
weights at 0.8."""
APPEND_SEQUENCES, APPEND_HEADS, APPEND_TOKENS = 64, 8, 16
GRAPH_BYTES = 10**9
"""Of NVFP4 that the calls of a graph read, at least."""
REPLAYS = 4
"""Between two events: the GPU waits for the launch of the first one alone."""


@dataclass(frozen=True)
class Shape:
    """One decode call: a query token for each of ``batch`` sequences of ``length`` tokens."""

    batch: int
    heads: int
    heads_kv: int
    length: int
    head_dim: int

    @property
    def elements(self) -> int:
        """Of K and V."""
        return 2 * self.batch * self.heads_kv * self.length * self.head_dim

    @property
    def nvfp4_bytes(self) -> int:
        """Of K and V in NVFP4."""
        return int(self.elements * OUR_BITS / 8)

    @property
    def title(self) -> str:
        """In words."""
        return f"{self.batch}, {self.heads}/{self.heads_kv}, {self.length}, {self.head_dim}"


SHAPES = (
    Shape(1, 32, 8, 32768, 128),
    Shape(16, 32, 8, 8192, 128),
    Shape(64, 32, 8, 4096, 128),
    Shape(16, 64, 8, 16384, 128),
    Shape(32, 32, 32, 4096, 128),
)


@dataclass(frozen=True)
class Row:
    """One timed run of a shape, and its worst head's distance from float32 attention."""

    shape: Shape
    name: str
    calls: int
    """Of a graph."""
    graph_us: float
    behind_us: float
    """Behind a small kernel, and with it."""
    eager_us: float
    bits: float
    copy_tb_s: float
    fastest_peer_us: float
    """Of the peers' graph replays."""
    relative_l2: float
    host_us: float | None = None

    @property
    def tb_s(self) -> float:
        return self.shape.elements * self.bits / 8 / self.graph_us / 1e6

    @property
    def share_of_copy(self) -> float:
        return self.tb_s / self.copy_tb_s

    @property
    def times_peer(self) -> float:
        """Speed as a multiple of the fastest peer's."""
        return self.fastest_peer_us / self.graph_us


@dataclass(frozen=True)
class Append:
    """Microseconds to append a token to each of 64 sequences: GPU time, mean of 16 in a row, and host time."""

    gpu_us: float
    host_us: float


@dataclass(frozen=True)
class Report:
    """What a run found, and on what machine (``measure.machine``)."""

    machine: dict[str, str]
    rows: list[Row]
    append: Append

    def as_json(self) -> dict[str, Any]:
        """As ``--json`` writes it, derived figures included."""
        derived = ("tb_s", "share_of_copy", "times_peer")
        return {
            "machine": self.machine,
            "relative_l2_bound": RELATIVE_L2_BOUND,
            "rows": [asdict(row) | {name: getattr(row, name) for name in derived} for row in self.rows],
            "append": asdict(self.append) | {"sequences": APPEND_SEQUENCES, "heads_kv": APPEND_HEADS, "head_dim": 128},
        }

    @classmethod
    def of_json(cls, report: dict[str, Any]) -> Report:
        """What ``as_json`` made into one. ``KeyError`` where something is missing."""

        def read(kind, entry, **replaced):
            return kind(**{field.name: entry[field.name] for field in fields(kind)} | replaced)

        rows = [read(Row, row, shape=Shape(**row["shape"])) for row in report["rows"]]
        return cls(report["machine"], rows, read(Append, report["append"]))


def shipped_report() -> Report:
    """The run on one H200 whose JSON is shipped with the package (``data/README.md``)."""
    text = resources.files("nbfmha").joinpath("data", "decode_h200.json").read_text("utf-8")
    return Report.of_json(json.loads(text))


def main(json_path: Path | str | None = None) -> None:
    """Check, time and print.

    Raises ``RuntimeError`` without a GPU, or where torch has no FlashAttention for it or no implementation of ours runs on
    it; ``AssertionError`` if a result is wrong.
    """
    torch = measure.require_gpu()
    console = measure.console()
    rows = [row for shape in SHAPES for row in time_shape(torch, shape)]
    one = torch.zeros(1, device="cuda")
    machine = measure.machine() | {"host_us_of_torch_add": f"{measure.host_us(lambda: one.add_(1)):.1f}"}
    report = Report(machine, rows, time_append(torch))
    console.print(table(report))
    measure.write_json(json_path, report.as_json())


def make_inputs(torch, shape: Shape, sets: int, device: str = "cuda", seed: int = 0) -> tuple[Any, Any, Any]:
    """q (sets, batch, heads, head_dim), k and v (sets, batch, heads_kv, length, head_dim), bfloat16. Each query looks for
    one key, which has about half of its weight; keys and values have a mean over the tokens, as a trained model's do."""
    generator = torch.Generator(device).manual_seed(seed)
    size = (sets, shape.batch, shape.heads_kv, shape.length, shape.head_dim)

    def normal(*size: int):
        return torch.randn(size, generator=generator, device=device)

    # set by set: float32 of all would take twice what the benchmark itself takes
    k, v = (torch.empty(size, dtype=torch.bfloat16, device=device) for _ in range(2))
    q = torch.empty((sets, shape.batch, shape.heads, shape.head_dim), dtype=torch.bfloat16, device=device)
    focus = (math.log(shape.length) + 1) / math.sqrt(shape.head_dim)
    for i in range(sets):
        key = normal(*size[1:])
        group = (*size[1:3], shape.heads // shape.heads_kv)
        sought = torch.randint(shape.length, group, generator=generator, device=device)
        picked = key.gather(2, sought[..., None].expand(*sought.shape, shape.head_dim))
        q[i] = (focus * picked + 0.3 * torch.randn(picked.shape, generator=generator, device=device)).flatten(1, 2)
        k[i] = key + 2 * normal(*size[1:3], 1, shape.head_dim)
        v[i] = normal(*size[1:]) + 0.5 * normal(*size[1:3], 1, shape.head_dim)
    return q, k, v


def make_cache(torch, k: Any, v: Any, chunk: int = 1024, **windows: int) -> tuple[Any, list[list[int]]]:
    """A cache of all sequences (sets, batch, heads_kv, length, head_dim) and the ids of each set. The sequences grow in
    turn, so that pages of one lie among those of the others. windows: ``recent_tokens`` and ``sink_tokens`` of it."""
    import nbfmha

    sets, batch, heads_kv, length, head_dim = k.shape
    kinds = {"num_heads_kv": heads_kv, "head_dim": head_dim, **windows}
    sequences = sets * batch
    cache = nbfmha.PagedKVCache(
        like=k, pages=sequences * -(-length // 64), max_sequences=sequences, max_length=length, **kinds
    )
    ids = cache.allocate(sequences)
    for first in range(0, length, chunk):
        for i, sequence in enumerate(ids):
            rows = [x[i // batch, i % batch, :, first : first + chunk].transpose(0, 1) for x in (k, v)]
            cache.append(*rows, [sequence], [0, rows[0].shape[0]])
    return cache, [ids[i * batch : (i + 1) * batch] for i in range(sets)]


def sets_of(torch, shape: Shape) -> int:
    """Sets of sequences whose NVFP4 exceeds L2 four times."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return 4 * l2 // shape.nvfp4_bytes + 1


def order_of(shape: Shape, sets: int) -> list[int]:
    """The set of each call of a graph: all of them in turn, as often as it takes to read ``GRAPH_BYTES``."""
    return list(range(sets)) * math.ceil(GRAPH_BYTES / (sets * shape.nvfp4_bytes))


def time_shape(torch, shape: Shape, *, rounds: int = 11) -> list[Row]:
    """Check and time every run of a shape, all in turn."""
    sets = sets_of(torch, shape)
    runs, errors = check(torch, shape, sets)
    order, one = order_of(shape, sets), torch.zeros(1, device="cuda")
    graphs = {name: _graph(torch, run, order) for name, run in runs.items()}
    behind = {name: _graph(torch, run, order, lambda: one.add_(1)) for name, run in runs.items()}
    copy = _copy(torch)
    replays = {name: graph.replay for name, graph in graphs.items()}
    graph_ms = measure.median_ms({**replays, "copy": copy}, rounds=rounds, repeats=REPLAYS)
    replays = {name: graph.replay for name, graph in behind.items()}
    behind_ms = measure.median_ms(replays, rounds=rounds, repeats=REPLAYS)
    eager = {name: lambda run=run: [run(i) for i in order] for name, run in runs.items()}
    eager_ms = measure.median_ms(eager, rounds=rounds, repeats=REPLAYS)
    # not right after the start, where calls of the first shape took the host longer than those of the others
    host = {name: measure.host_us(lambda run=runs[name]: run(0), launches=50, rounds=15) for name in CACHES}
    copy_tb_s = 2 * COPY_BYTES / graph_ms["copy"] / 1e9
    per_call = {name: [1e3 * ms[name] / len(order) for ms in (graph_ms, behind_ms, eager_ms)] for name in runs}
    fastest = min(graph_us for name, (graph_us, _, _) in per_call.items() if name not in CACHES)
    rows = []
    for name in runs:
        bits = OUR_BITS if name in CACHES else PEER_BITS
        rows.append(Row(shape, name, len(order), *per_call[name], bits, copy_tb_s, fastest, errors[name], host.get(name)))
    return rows


def check(torch, shape: Shape, sets: int) -> tuple[dict[str, Callable[[int], Any]], dict[str, float]]:
    """Name -> run of set i, every output of every set compared first; name -> relative L2 of the worst head.
    ``AssertionError`` names what is wrong."""
    q, k, v = make_inputs(torch, shape, sets)
    ours = {name: _ours(torch, q, k, v, windows) for name, windows in CACHES.items()}
    runs: dict[str, Callable[[int], Any]] = {**ours, **_peers(torch, q, k, v, shape.heads // shape.heads_kv)}
    expected = [_expected(torch, q[i], k[i], v[i]) for i in range(sets)]
    errors = {}
    for name, run in runs.items():
        bound = RELATIVE_L2_BOUND if name in CACHES else PEER_BOUND
        with poisoned(torch) if name in CACHES else nullcontext():  # under which torch refuses cuDNN
            found = [run(i).reshape(shape.batch, shape.heads, 1, shape.head_dim) for i in range(sets)]
        errors[name] = max(worst_head(torch, out, own) for out, own in zip(found, expected, strict=True))
        check_below(errors[name], bound, f"{name}, batch, heads, length, head_dim = {shape.title}")
    return runs, errors


def _ours(torch, q, k, v, windows: dict[str, int]) -> Callable[[int], Any]:
    import nbfmha

    cache, ids = make_cache(torch, k, v, **windows)
    slots = [cache.device_ids(own) for own in ids]
    return lambda i: nbfmha.decode(q[i].unsqueeze(1), cache, slots[i])


def _expected(torch, q, k, v):
    """(batch, heads, 1, head_dim), float32 attention of one set, sequence by sequence."""
    out = []
    for own_q, own_k, own_v in zip(q, k, v, strict=True):
        grouped = own_q.float().reshape(own_k.shape[0], -1, own_k.shape[2])
        weights = torch.softmax(grouped @ own_k.float().mT / math.sqrt(own_k.shape[2]), dim=-1)
        out.append((weights @ own_v.float()).flatten(0, 1))
    return torch.stack(out).unsqueeze(2)


def _peers(torch, q, k, v, group: int) -> dict[str, Callable[[int], Any]]:
    """What torch has for this GPU: FlashAttention in both forms, cuDNN."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    sdpa = torch.nn.functional.scaled_dot_product_attention

    def plain(backend):
        def run(i: int):
            with sdpa_kernel(backend):
                return sdpa(q[i].unsqueeze(2), k[i], v[i], enable_gqa=group > 1)

        return run

    def packed(i: int):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return sdpa(q[i].unflatten(1, (-1, group)), k[i], v[i])

    peers = {FLASH: plain(SDPBackend.FLASH_ATTENTION)}
    if group > 1:
        peers[FLASH_PACKED] = packed
    cudnn = plain(SDPBackend.CUDNN_ATTENTION)
    if runs_here(lambda: cudnn(0)):
        peers[CUDNN] = cudnn
    return peers


def _graph(torch, run: Callable[[int], Any], order: list[int], ahead: Callable[[], Any] = lambda: None):
    """A CUDA graph of calls on these sets, and of ``ahead`` ahead of each. Its outputs are its own: they are not read."""

    def calls() -> None:
        for i in order:
            ahead()
            run(i)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls()  # what is compiled or loaded at a first call is so before the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    return graph


def _copy(torch) -> Callable[[], Any]:
    """torch's copy of 1 GiB, the ceiling."""
    source = torch.randint(-128, 128, (COPY_BYTES,), dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def time_append(torch, *, rounds: int = 11) -> Append:
    """A token to each of 64 sequences of 1008 tokens and more: a graph of 16 appends."""
    import nbfmha

    generator = torch.Generator("cuda").manual_seed(1)
    size = (APPEND_SEQUENCES, APPEND_HEADS, 128)
    steps = APPEND_TOKENS * (REPLAYS + 16) * (rounds + 2) + 400  # 16: untimed replays, of which four were needed
    k, v = (torch.randn(size, generator=generator, device="cuda").bfloat16() for _ in range(2))
    cache = nbfmha.PagedKVCache(
        like=k, pages=APPEND_SEQUENCES * -(-(1008 + steps) // 64), num_heads_kv=APPEND_HEADS, head_dim=128,
        max_sequences=APPEND_SEQUENCES, max_length=1008 + steps,
    )  # fmt: skip
    ids = cache.allocate(APPEND_SEQUENCES)
    chunk = torch.randn((1008, APPEND_HEADS, 128), generator=generator, device="cuda").bfloat16()
    for sequence in ids:
        cache.append(chunk, chunk, [sequence], [0, 1008])
    cache.reserve(ids, steps)
    host = measure.host_us(lambda: cache.append(k, v, ids), launches=20, rounds=5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(APPEND_TOKENS):
            cache.append(k, v, ids)

    def replay() -> None:
        graph.replay()
        cache.advance(ids, APPEND_TOKENS)

    times = measure.median_ms({"append": replay}, rounds=rounds, repeats=REPLAYS)
    return Append(1e3 * times["append"] / APPEND_TOKENS, host)


def table(report: Report):
    """Sections a shape, a line a run."""
    append, copies = report.append, [row.copy_tb_s for row in report.rows]
    title = f"decode, one query token, bf16, on {report.machine['gpu']}; copy {min(copies):.2f} to {max(copies):.2f} TB/s\n"
    title += f"append a token to {APPEND_SEQUENCES} sequences ({APPEND_HEADS} heads, 128): "
    title += f"{append.gpu_us:.1f} us, host {append.host_us:.1f}"
    headings = (
        "batch, heads, length, head_dim", "", "us", "behind", "eager", "host", "TB/s", "of copy", "x peer", "rel. L2"
    )  # fmt: skip
    lines = (
        (
            row.shape.title,
            row.name,
            f"{row.graph_us:.1f}",
            f"{row.behind_us:.1f}",
            f"{row.eager_us:.1f}",
            "-" if row.host_us is None else f"{row.host_us:.1f}",
            f"{row.tb_s:.2f}",
            f"{row.share_of_copy:.0%}",
            f"{row.times_peer:.2f}",
            f"{row.relative_l2:.4f}",
        )
        for row in report.rows
    )
    return measure.sections_table(title, headings, lines)
