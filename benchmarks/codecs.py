"""Every codec by itself: bytes a number, what is lost, how fast.

    python benchmarks/codecs.py [--millions 4] [--repeat 5] [--json]

An update of `--millions` million numbers, normally distributed with a tenth of them ten times as large, as matrices of
1,024 columns; one thread. Speeds are those of the float32 numbers that go in or come out, as a part of a plain copy of
the same bytes in the same run.

    bytes       a number
    error       ‖x − x̂‖ / ‖x‖
    encode      its speed, 1 = a copy's; decode as well
    bias        only of codecs that are right in the mean: the mean of 64 codings of a million numbers against the
                numbers themselves, in standard errors; root of the mean square, which is 1 if there is no bias
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor

from commonweight.codec.chain import SPAN, Codec, codec_of
from commonweight.codec.stage import Draw
from commonweight.recipe.schema import CompressionSpec, Method

COLUMNS = 1024
DRAWS = 64


def stage(name: str, **options: Any) -> Method:
    return Method(name=name, **options)


CODECS: dict[str, CompressionSpec] = {
    "huffman": CompressionSpec(pack=stage("huffman")),
    "bf16": CompressionSpec(round=stage("bf16")),
    "fp16": CompressionSpec(round=stage("fp16")),
    "int8": CompressionSpec(round=stage("int8")),
    "uniform 8": CompressionSpec(round=stage("uniform", bits=8), error_feedback=False),
    "uniform 4": CompressionSpec(round=stage("uniform", bits=4), error_feedback=False),
    "uniform 4 + huffman": CompressionSpec(round=stage("uniform", bits=4), pack=stage("huffman"), error_feedback=False),
    "nf4": CompressionSpec(round=stage("nf4"), error_feedback=False),
    "nf4 nearest": CompressionSpec(round=stage("nf4", rounding="nearest")),
    "uniform 2": CompressionSpec(round=stage("uniform", bits=2), error_feedback=False),
    "uniform 2 + huffman": CompressionSpec(round=stage("uniform", bits=2), pack=stage("huffman"), error_feedback=False),
    "sign": CompressionSpec(round=stage("sign")),
    "random-k 5 %": CompressionSpec(shorten=stage("random-k", keep=0.05), error_feedback=False),
    "top-k 5 %": CompressionSpec(shorten=stage("top-k", keep=0.05)),
    "top-k 5 % + uniform 4 + huffman": CompressionSpec(
        shorten=stage("top-k", keep=0.05), round=stage("uniform", bits=4), pack=stage("huffman")
    ),
    "low-rank 4": CompressionSpec(shorten=stage("low-rank", rank=4)),
}


def update(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(count, generator=generator)
    values[torch.rand(count, generator=generator) < 0.1] *= 10
    return values


def best(work: Callable[[], Any], repeat: int) -> float:
    seconds = []
    for _ in range(repeat):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def figures(codec: Codec, values: Tensor, copy_s: float, repeat: int) -> dict[str, float]:
    spans = [values[k : k + SPAN] for k in range(0, len(values), SPAN)]
    shapes = [[(len(span) // COLUMNS, COLUMNS)] for span in spans]
    draws = [Draw(0, number) for number in range(len(spans))]
    payloads = [codec.encode(*given) for given in zip(spans, shapes, draws, strict=True)]
    back = torch.cat([codec.decode(*given) for given in zip(payloads, shapes, draws, strict=True)])
    encode_s = best(lambda: [codec.encode(*given) for given in zip(spans, shapes, draws, strict=True)], repeat)
    decode_s = best(lambda: [codec.decode(*given) for given in zip(payloads, shapes, draws, strict=True)], repeat)
    found = {
        "bytes": sum(len(payload) for payload in payloads) / len(values),
        "error": float((back - values).norm() / values.norm()),
        "encode_to_copy": copy_s / encode_s,
        "decode_to_copy": copy_s / decode_s,
        "encode_mb_s": 4 * len(values) / 1e6 / encode_s,
        "decode_mb_s": 4 * len(values) / 1e6 / decode_s,
    }
    claims = codec.unbiased and (codec.shortening is None or codec.shortening.name == "random-k")
    if claims and (codec.rounding.stochastic or codec.shortening is not None):
        found["bias"] = bias(codec, spans[0], shapes[0])
    return found


def bias(codec: Codec, values: Tensor, shape: list[tuple[int, int]]) -> float:
    total, squares = torch.zeros(len(values), dtype=torch.float64), torch.zeros(len(values), dtype=torch.float64)
    for number in range(DRAWS):
        draw = Draw(1, number)
        error = codec.decode(codec.encode(values, shape, draw), shape, draw).double() - values
        total += error
        squares += error**2
    # of all numbers together: a single one's standard error cannot be told from so few draws
    return math.sqrt(float((total**2).sum()) / float(squares.sum()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, default=4)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    values = update(int(given.millions * (1 << 20)) // COLUMNS * COLUMNS)
    other = torch.empty_like(values)
    copy_s = best(lambda: other.copy_(values), max(5, given.repeat))
    table: dict[str, Any] = {}
    for name, spec in CODECS.items():
        codec = codec_of(spec)
        if codec is not None:
            table[name] = figures(codec, values, copy_s, given.repeat)
    result = {"numbers": len(values), "copy_mb_s": 4 * len(values) / 1e6 / copy_s, "codecs": table}
    if given.json:
        print(json.dumps(result))
        return
    print(f"copy: {result['copy_mb_s']:,.0f} MB/s")
    print(f"{'codec':32} {'bytes':>7} {'error':>8} {'encode':>7} {'decode':>7} {'MB/s':>13} {'bias':>6}")
    for name, row in table.items():
        speeds = f"{row['encode_mb_s']:.0f}, {row['decode_mb_s']:.0f}"
        told = f"{row['bias']:6.3f}" if "bias" in row else f"{'–':>6}"
        print(
            f"{name:32} {row['bytes']:7.4f} {row['error']:8.5f} {row['encode_to_copy']:7.3f} "
            f"{row['decode_to_copy']:7.3f} {speeds:>13} {told}"
        )


if __name__ == "__main__":
    main()
