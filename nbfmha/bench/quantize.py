"""``nbfmha bench quantize``: TB/s of the quantise and dequantise kernels on a tensor larger than the L2 cache.

Bytes are the fewest that must move: input once, codes and scales once. The ceiling is a device-to-device copy of as many
bytes in the same run (bytes read plus bytes written). The peer is the same quantiser written in torch and compiled.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nbfmha import nvfp4, quantization
from nbfmha.bench import measure

SHAPE = (32, 65536, 128)  # 2^28 elements: 512 MiB of f16, ten times the L2 of an H100


@dataclass(frozen=True)
class Row:
    """One timed kernel: ``bytes_moved`` the fewest possible."""

    name: str
    milliseconds: float
    bytes_moved: int
    copy_tb_s: float

    @property
    def tb_s(self) -> float:
        return self.bytes_moved / self.milliseconds / 1e9

    @property
    def share_of_copy(self) -> float:
        return self.tb_s / self.copy_tb_s


def torch_quantizer(torch) -> Callable:
    """NVFP4 quantisation (amax rule, linear scales) in plain torch, compiled: what one would write without kernels."""

    @torch.compile(dynamic=False)
    def quantize(x):
        blocks = x.float().unflatten(-1, (-1, 16))
        sf = (blocks.abs().amax(-1) / 6).clamp(max=448).to(torch.float8_e4m3fn)
        s = sf.float().unsqueeze(-1)
        y = torch.where(s == 0, 0, blocks / s)
        magnitude = y.abs()
        codes = (magnitude > 0.25).int() + (magnitude >= 0.75).int() + (magnitude > 1.25).int() + (magnitude >= 1.75).int()
        codes = codes + (magnitude > 2.5).int() + (magnitude >= 3.5).int() + (magnitude > 5).int()
        codes = torch.where(torch.signbit(y) & (s != 0), codes + 8, codes).flatten(-2).to(torch.uint8)
        return codes[..., 0::2] | (codes[..., 1::2] << 4), sf.view(torch.uint8)

    return quantize


def main(json_path: Path | str | None = None) -> None:
    """Check, time and print. Raises ``RuntimeError`` without a GPU and ``AssertionError`` if a result is wrong."""
    torch = measure.require_gpu()
    console = measure.console()
    x = {dtype: torch.randn(SHAPE, device="cuda").to(getattr(torch, dtype)) for dtype in ("float16", "bfloat16", "float32")}
    peer = torch_quantizer(torch)
    _check(torch, x["float16"], peer)

    elements = math.prod(SHAPE)
    runs: dict[str, tuple[Callable, float]] = {}  # name -> (run, bytes an element)

    def add_quantize(name: str, dtype: str, **options) -> None:
        source, bits = x[dtype], 4.25 if options.get("format") == "mxfp4" else 4.5
        runs[name] = (lambda: quantization.quantize(source, **options), source.element_size() + bits / 8)

    add_quantize("quantise f16", "float16")
    add_quantize("quantise bf16", "bfloat16")
    add_quantize("quantise f32", "float32")
    add_quantize("quantise f16, blocked_128x4 scales", "float16", scale_layout="blocked_128x4")
    add_quantize("quantise f16, global scale", "float16", global_scale=0.01)
    add_quantize("quantise f16, four_over_six", "float16", scale="four_over_six")
    add_quantize("quantise f16, along tokens", "float16", axis="tokens")
    add_quantize("quantise f16 to MXFP4", "float16", format="mxfp4")
    runs["quantise f16, torch.compile"] = (lambda: peer(x["float16"]), 2 + 4.5 / 8)
    by_rows = quantization.quantize(x["float16"])
    by_tokens = quantization.quantize(x["float16"], axis="tokens")
    for dtype, size in (("float16", 2), ("bfloat16", 2), ("float32", 4)):
        runs[f"dequantise to {dtype}"] = (lambda dtype=dtype: quantization.dequantize(by_rows, dtype), size + 4.5 / 8)
    runs["dequantise to float16, along tokens"] = (lambda: quantization.dequantize(by_tokens, "float16"), 2 + 4.5 / 8)

    source, target = x["float16"].view(-1), torch.empty(elements, dtype=torch.float16, device="cuda")
    times = measure.median_ms({"copy": lambda: target.copy_(source)} | {name: run for name, (run, _) in runs.items()})
    copy_tb_s = 4 * elements / times["copy"] / 1e9
    rows = [Row(name, times[name], int(size * elements), copy_tb_s) for name, (_, size) in runs.items()]
    _print(console, rows, copy_tb_s)
    measure.write_json(
        json_path,
        {
            "machine": measure.machine(),
            "shape": SHAPE,
            "copy_tb_s": copy_tb_s,
            "rows": [
                {"name": r.name, "ms": r.milliseconds, "tb_s": r.tb_s, "share_of_copy": r.share_of_copy} for r in rows
            ],
        },
    )


def _check(torch, x, peer) -> None:
    """Ours and the peer's against the NumPy reference on a part of the tensor."""
    part = x[:1, :4096].contiguous()
    reference = nvfp4.quantize(part.cpu().numpy())
    ours = quantization.quantize(part)
    codes, scales = peer(x)
    np.testing.assert_array_equal(ours.codes.cpu().numpy(), reference.codes)
    np.testing.assert_array_equal(ours.scales.cpu().numpy(), reference.scales)
    np.testing.assert_array_equal(scales[:1, :4096].cpu().numpy(), reference.scales)
    differing = int((codes[:1, :4096].cpu().numpy() != reference.codes).sum())
    if differing > reference.codes.size * 1e-3:  # the peer's compiled division may break ties otherwise
        raise AssertionError(f"the torch quantiser differs in {differing} of {reference.codes.size} bytes")
    torch.cuda.synchronize()


def _print(console, rows: list[Row], copy_tb_s: float) -> None:
    from rich.table import Table

    table = Table(title=f"{math.prod(SHAPE):,} elements on {measure.machine()['gpu']}; copy {copy_tb_s:.2f} TB/s")
    for heading in ("kernel", "ms", "TB/s", "of copy"):
        table.add_column(heading, justify="left" if heading == "kernel" else "right")
    for row in rows:
        table.add_row(row.name, f"{row.milliseconds:.3f}", f"{row.tb_s:.2f}", f"{row.share_of_copy:.0%}")
    console.print(table)
