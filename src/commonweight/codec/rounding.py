"""Fewer bits a number.

Numbers are taken in blocks, each with a scale of its own, so that one large number costs only its block its precision.
Scales are bfloat16, rounded up: what is divided by them never leaves the range of the codes.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from .stage import BadPayload, Draw, Rounding


class Plain(Rounding):
    """float32, as it is: what a codec without a rounding does."""

    name, rule = "float32", "x"
    stochastic = False

    def num_bytes(self, count: int) -> int:
        return 4 * count

    def encode(self, values: Tensor, draw: Draw) -> bytes:
        return _bytes(values)

    def decode(self, raw: bytes, count: int) -> Tensor:
        return _finite(_tensor(raw, torch.float32))

    def bound(self, values: Tensor) -> Tensor:
        return torch.zeros(len(values), dtype=torch.float64)


class _Cast(Rounding):
    dtype: torch.dtype
    #: 2⁻ᵖ, half the distance of neighbours, as a part of a number; and that of the smallest numbers
    half_step: float
    smallest: float
    stochastic = False

    def num_bytes(self, count: int) -> int:
        return 2 * count

    def encode(self, values: Tensor, draw: Draw) -> bytes:
        most = torch.finfo(self.dtype).max
        return _bytes(values.clamp(-most, most).to(self.dtype))

    def decode(self, raw: bytes, count: int) -> Tensor:
        return _finite(_tensor(raw, self.dtype).float())

    def bound(self, values: Tensor) -> Tensor:
        size, most = values.double().abs(), torch.finfo(self.dtype).max
        return torch.maximum(size * self.half_step, size - most).clamp(min=self.smallest)


class BFloat16(_Cast):
    """16 bits: float32's range, 8 bits of precision."""

    name, rule = "bf16", "x to bfloat16, nearest"
    dtype, half_step, smallest = torch.bfloat16, 2.0**-8, 2.0**-133


class Float16(_Cast):
    """16 bits: 11 bits of precision; what is larger than 65504 becomes that."""

    name, rule = "fp16", "x to float16, nearest; at most ±65504"
    dtype, half_step, smallest = torch.float16, 2.0**-11, 2.0**-25


class UniformOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: Literal[2, 3, 4, 5, 6, 8] = Field(8, description="Bits a number; with 2, the codes are −1, 0 and 1.")
    block: int = Field(64, ge=8, le=65536, description="Numbers that share a scale, which takes 16 bits.")
    rounding: Literal["stochastic", "nearest"] = Field(
        "stochastic", description="`stochastic`: up or down at random, right in the mean. `nearest`: half the error."
    )


class Uniform(Rounding):
    """Equal steps between −max|x| and max|x| of a block."""

    name = "uniform"
    rule = "s·⌊x/s⌉, s = max|x| / (2^(bits−1) − 1) of a block; at random up or down: E = x"
    source = "Alistarh et al., QSGD, NeurIPS 2017, with a scale a block"
    Options = UniformOptions
    options: UniformOptions

    @property
    def stochastic(self) -> bool:
        return self.options.rounding == "stochastic"

    @property
    def levels(self) -> int:
        return int(2 ** (self.options.bits - 1)) - 1

    def num_bytes(self, count: int) -> int:
        return 2 * _blocks(count, self.options.block) + packed_bytes(count, self.options.bits)

    def encode(self, values: Tensor, draw: Draw) -> bytes:
        blocks = _in_blocks(values, self.options.block)
        steps = self._steps(blocks)
        scaled = torch.where(steps > 0, blocks / steps, 0.0)
        if self.stochastic:
            scaled = scaled.add_(torch.rand(scaled.shape, generator=draw.generator("rounding"))).floor_()
        else:
            scaled = scaled.round_()
        codes = scaled.clamp_(-self.levels, self.levels).add_(self.levels).to(torch.uint8).reshape(-1)[: len(values)]
        return _bytes(steps.to(torch.bfloat16)) + pack(codes, self.options.bits)

    def decode(self, raw: bytes, count: int) -> Tensor:
        block = self.options.block
        steps, cut = _scales(raw, count, block)
        codes = unpack(raw[cut:], count, self.options.bits)
        if count and int(codes.max()) > 2 * self.levels:
            raise BadPayload(f"a code that {self.options.bits} bits of {self.name} do not have")
        blocks = _in_blocks(codes.float() - self.levels, block)
        return _held(blocks * steps, count)

    def bound(self, values: Tensor) -> Tensor:
        blocks = _in_blocks(values, self.options.block)
        steps = self._steps(blocks).double().expand(blocks.shape).reshape(-1)[: len(values)]
        # a little more for what float32 itself rounds in x/s and in s·code
        return steps * (1.0 if self.stochastic else 0.5) + values.double().abs() * 2.0**-22

    def _steps(self, blocks: Tensor) -> Tensor:
        return _upwards(blocks.abs().amax(dim=1, keepdim=True) / self.levels)


class Int8Options(UniformOptions):
    bits: Literal[8] = Field(8, description="8.")
    rounding: Literal["stochastic", "nearest"] = Field("nearest", description="As for `uniform`.")


class Int8(Uniform):
    """`uniform` with 8 bits, to the nearest."""

    name, rule = "int8", "s·⌊x/s⌉, s = max|x| / 127 of a block"
    Options = Int8Options


#: quantiles of the normal distribution, scaled to [−1, 1], with an exact 0: those of QLoRA's data type
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class NormalFloatOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    block: int = Field(64, ge=8, le=65536, description="Numbers that share a scale, which takes 16 bits.")
    rounding: Literal["stochastic", "nearest"] = Field("stochastic", description="As for `uniform`.")


class NormalFloat4(Rounding):
    """4 bits: levels that lie where normally distributed numbers do."""

    name, rule = "nf4", "m·level, the one of 16 quantiles of N(0, 1) near x/m, m = max|x| of a block"
    source = "Dettmers et al., QLoRA, NeurIPS 2023"
    Options = NormalFloatOptions
    options: NormalFloatOptions
    levels = torch.tensor(NF4_LEVELS)

    @property
    def stochastic(self) -> bool:
        return self.options.rounding == "stochastic"

    def num_bytes(self, count: int) -> int:
        return 2 * _blocks(count, self.options.block) + packed_bytes(count, 4)

    def encode(self, values: Tensor, draw: Draw) -> bytes:
        blocks = _in_blocks(values, self.options.block)
        sizes = _upwards(blocks.abs().amax(dim=1, keepdim=True))
        scaled = torch.where(sizes > 0, blocks / sizes, 0.0).clamp_(-1, 1)
        if self.stochastic:  # the border between two levels lies anywhere between them, a middle one in the mean
            below = torch.bucketize(scaled, self.levels[1:-1], out_int32=True, right=True)
            low, widths = self.levels.take(below.long()), (self.levels[1:] - self.levels[:-1]).take(below.long())
            borders = torch.rand(scaled.shape, generator=draw.generator("rounding")).mul_(widths).add_(low)
            raised = below + (scaled > borders)
        else:
            raised = torch.bucketize(scaled, (self.levels[1:] + self.levels[:-1]) / 2, out_int32=True)
        codes = raised.to(torch.uint8).reshape(-1)[: len(values)]
        return _bytes(sizes.to(torch.bfloat16)) + pack(codes, 4)

    def decode(self, raw: bytes, count: int) -> Tensor:
        sizes, cut = _scales(raw, count, self.options.block)
        codes = unpack(raw[cut:], count, 4)
        blocks = _in_blocks(self.levels[codes.long()], self.options.block)
        return _held(blocks * sizes, count)

    def bound(self, values: Tensor) -> Tensor:
        blocks = _in_blocks(values, self.options.block)
        sizes = _upwards(blocks.abs().amax(dim=1, keepdim=True)).double()
        widest = float((self.levels[1:] - self.levels[:-1]).max()) * (1.0 if self.stochastic else 0.5)
        return (sizes * widest).expand(blocks.shape).reshape(-1)[: len(values)] + values.double().abs() * 2.0**-22


class SignOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    block: int = Field(256, ge=8, le=65536, description="Numbers that share a scale, which takes 16 bits.")


class Sign(Rounding):
    """1 bit: a sign, and the mean size of a block. Wrong in the mean, so it needs error feedback."""

    name, rule = "sign", "m·sign(x), m = mean |x| of a block"
    source = "Seide et al., 1-Bit SGD, Interspeech 2014; Karimireddy et al., ICML 2019"
    Options = SignOptions
    options: SignOptions
    stochastic = False

    def num_bytes(self, count: int) -> int:
        return 2 * _blocks(count, self.options.block) + packed_bytes(count, 1)

    def encode(self, values: Tensor, draw: Draw) -> bytes:
        return _bytes(self._sizes(values).to(torch.bfloat16)) + pack((values >= 0).to(torch.uint8), 1)

    def decode(self, raw: bytes, count: int) -> Tensor:
        sizes, cut = _scales(raw, count, self.options.block)
        signs = _in_blocks(unpack(raw[cut:], count, 1).float() * 2 - 1, self.options.block)
        return _held(signs * sizes, count)

    def bound(self, values: Tensor) -> Tensor:
        sizes = self._sizes(values).double().expand(-1, self.options.block).reshape(-1)[: len(values)]
        return (values.double().abs() - sizes).abs()

    def _sizes(self, values: Tensor) -> Tensor:
        block = self.options.block
        sums = _in_blocks(values.double().abs(), block).sum(dim=1, keepdim=True)
        lengths = torch.full_like(sums, block)
        if len(values) % block:
            lengths[-1] = len(values) % block
        most = torch.finfo(torch.bfloat16).max
        return (sums / lengths).clamp(max=most).to(torch.bfloat16).float()


# --- bits and blocks


def packed_bytes(count: int, bits: int) -> int:
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> bytes:
    """Codes of so many bits, one after the other, the first in the lowest bits.

    Args:
        codes: 1-D, uint8, each below 2^bits.
    """
    array = codes.numpy()
    if bits == 8:
        return array.tobytes()
    if 8 % bits:
        planes = np.unpackbits(array[:, None], axis=1, count=bits, bitorder="little")
        return np.packbits(planes.reshape(-1), bitorder="little").tobytes()
    if bits == 1:
        return np.packbits(array, bitorder="little").tobytes()
    each = 8 // bits
    padded = np.zeros(-(-len(array) // each) * each, dtype=np.uint8)
    padded[: len(array)] = array
    columns = padded.reshape(-1, each)
    packed = columns[:, 0].copy()
    for place in range(1, each):
        packed |= columns[:, place] << (place * bits)
    return packed.tobytes()


def unpack(raw: bytes, count: int, bits: int) -> Tensor:
    """The codes, 1-D, uint8. `raw` has `packed_bytes(count, bits)` bytes."""
    array = np.frombuffer(raw, dtype=np.uint8)
    if bits == 8:
        codes = array.copy()
    elif 8 % bits:
        planes = np.unpackbits(array, count=count * bits, bitorder="little").reshape(-1, bits)
        codes = np.packbits(planes, axis=1, bitorder="little")[:, 0]
    elif bits == 1:
        codes = np.unpackbits(array, count=count, bitorder="little")
    else:
        mask = np.uint8(2**bits - 1)
        columns = np.stack([(array >> (place * bits)) & mask for place in range(8 // bits)], axis=1)
        codes = columns.reshape(-1)[:count]
    return torch.from_numpy(np.ascontiguousarray(codes))


def _blocks(count: int, block: int) -> int:
    return -(-count // block)


def _in_blocks(values: Tensor, block: int) -> Tensor:
    """[blocks, block], zeros behind the last value."""
    missing = -len(values) % block
    return torch.nn.functional.pad(values, (0, missing)).reshape(-1, block)


def _upwards(sizes: Tensor) -> Tensor:
    """The nearest bfloat16 that is not smaller, or the largest there is; held in float32. Not negative."""
    down = (sizes.view(torch.int32) & -0x10000).view(torch.float32)
    up = ((sizes.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32)
    return torch.where(down == sizes, sizes, up).clamp(max=torch.finfo(torch.bfloat16).max)


def _scales(raw: bytes, count: int, block: int) -> tuple[Tensor, int]:
    """[blocks, 1], float32, and where they end."""
    cut = 2 * _blocks(count, block)
    scales = _tensor(raw[:cut], torch.bfloat16).float().reshape(-1, 1)
    if not bool((scales >= 0).logical_and_(scales.isfinite()).all()):
        raise BadPayload("a scale that is negative or not finite")
    return scales, cut


def _held(blocks: Tensor, count: int) -> Tensor:
    """What blocks hold; a scale that was rounded up may take a number beyond the largest that there is."""
    most = torch.finfo(torch.float32).max
    return blocks.reshape(-1)[:count].clamp(-most, most)


def _finite(values: Tensor) -> Tensor:
    if not bool(values.isfinite().all()):
        raise BadPayload("numbers that are not finite")
    return values


def _bytes(values: Tensor) -> bytes:
    whole = values.contiguous().reshape(-1)
    return (whole.view(torch.int16) if whole.dtype == torch.bfloat16 else whole).numpy().tobytes()


def _tensor(raw: bytes, dtype: torch.dtype) -> Tensor:
    if not raw:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(bytearray(raw), dtype=dtype)
