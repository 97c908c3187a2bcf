"""Benchmarks: each checks the result first, then times ours and the peers' in turn in one process.

Run by ``nbfmha bench NAME``; each module has ``main(json_path)``, that of ``prefill`` also takes names of recipes.
``HISTORY.md`` keeps one row an idea.
"""

BENCHMARKS = {
    "emulator": "lane-instructions a second of the PTX emulator on this CPU; needs no GPU",
    "launch": "host cost of one launch and of a process's first launch",
    "quantize": "quantise and dequantise kernels beside a device copy and a torch.compile quantiser",
    "mma": "raw throughput of each mma.sync; without its GPU, the emulator's instruction counts",
    "prefill": "forward attention beside torch's FlashAttention-2 and cuDNN",
    "decode": "attention of one new token on a paged NVFP4 KV cache beside the same two on bf16, and appending to it",
}
