"""Codecs of four bits per element, with one fp32 scale per block of 256: 4.125 bits in all, an eighth of fp32.

Payload, for n elements::

    offset            bytes            what
    0                 4 * ceil(n/256)  one fp32 scale per block, as in int8
    4 * ceil(n/256)   ceil(n/2)        two codes a byte: of the even element in the low four bits, of the odd one above

The upper half of the last byte is 0 if n is odd. Element i is ``value[code[i]] * scale[i // 256]``, one fp32
multiplication. The highest bit of a code is the sign; the code 8 (no value but a sign) is not valid.

``int4``: value is the code as a two's complement number, -7 .. 7; the scale is ``absmax / 7``.

``e3m0``: a sign, three bits of exponent and no mantissa, as Streaming DiLoCo sends pseudo-gradients (Douillard et al.,
2025, arXiv:2501.18512). The lower three bits are 0 for zero, or e for ``2^(e - 7)``: 1/64, 1/32 .. 1; the scale is
``absmax``. The error is at most a third of an element from a 64th of the scale on, and a 128th of the scale below.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prime_async.work.block_scales import (
    absmax_scales,
    block_count,
    blocks,
    divide,
    per_part,
    read_scales,
    write_scales,
    wrong_scales,
    wrong_size,
)

SIGN = 8
"""The bit of a code that is its sign, and alone no code."""


class FourBitCodec(ABC):
    """See the module, and :class:`prime_async.work.codec.Codec` for what the methods promise.

    NaN or infinity raises :class:`~prime_async.errors.NonFiniteError`. A block whose scale would be below
    ``LEAST_SCALE`` becomes zero.
    """

    LEVELS: ClassVar[int]
    """The largest value of a code."""
    LEAST_SCALE: ClassVar[float]
    MOST_SCALE: ClassVar[float]
    """The largest fp32 that is finite when multiplied by ``LEVELS``."""
    VALUES: ClassVar[tuple[float, ...]]
    """What the sixteen codes stand for; that of the code 8 is never used."""

    def __init__(self) -> None:
        values = torch.tensor(self.VALUES)
        byte = torch.arange(256)
        self._pairs = torch.stack([values[byte & 15], values[byte >> 4]], dim=1)  # fp32 (256, 2)

    @abstractmethod
    def _codes(self, quotients: Tensor) -> Tensor:
        """The codes, uint8 (n,), of elements that are divided by their scales; these may be overwritten."""

    def payload_bytes(self, n: int) -> int:
        """Size of the payload of ``n`` elements."""
        return 4 * block_count(n) + (n + 1) // 2

    def encode(self, values: Tensor, out: Tensor, scratch: Tensor) -> int:
        """See :meth:`Codec.encode <prime_async.work.codec.Codec.encode>`."""
        n = values.numel()
        scales = absmax_scales(values, self.LEVELS, self.LEAST_SCALE, self.MOST_SCALE)
        divide(values, scales, scratch)
        codes = self._codes(scratch)
        packed = out[4 * scales.numel() :]
        packed.copy_(codes[0::2])
        packed[: n // 2] |= codes[1::2] << 4
        write_scales(scales, out)
        return out.numel()

    def check(self, payload: Tensor, n: int) -> str | None:
        """See :meth:`Codec.check <prime_async.work.codec.Codec.check>`."""
        if (reason := wrong_size(payload, self.payload_bytes(n))) or not n:
            return reason
        if reason := wrong_scales(read_scales(payload, n), self.LEAST_SCALE, self.MOST_SCALE):
            return reason
        packed = payload[4 * block_count(n) :]
        if bool((packed & 15 == SIGN).any()) or bool((packed >> 4 == SIGN).any()):
            return "a code is 8, which stands for nothing"
        if n % 2 and int(packed[-1]) > 15:
            return "the last byte has a second code: the number of elements is odd"
        return None

    def decode(self, payload: Tensor, out: Tensor, weight: float = 1.0) -> None:
        """See :meth:`Codec.decode <prime_async.work.codec.Codec.decode>`. The scales are multiplied by the weight."""
        n = out.numel()
        scales = read_scales(payload, n).mul_(weight)
        packed = payload[4 * scales.numel() :]
        if n > 1:
            torch.index_select(self._pairs, 0, packed[: n // 2].int(), out=out[: n // 2 * 2].view(-1, 2))
        if n % 2:
            out[-1] = self._pairs[int(packed[-1]), 0]
        for x, scale in zip(blocks(out), per_part(scales, n), strict=True):
            x.mul_(scale[:, None])


class Int4Codec(FourBitCodec):
    """Fifteen levels at equal distances, rounded to nearest, ties to even: off by at most half a scale."""

    name: Literal["int4"] = "int4"
    LEVELS = 7
    LEAST_SCALE = 2.0**-126
    MOST_SCALE = float.fromhex("0x1.249248p+125")
    VALUES = tuple(float(code - 16 if code >= SIGN else code) for code in range(16))

    def _codes(self, quotients: Tensor) -> Tensor:
        return quotients.round_().to(torch.int8).view(torch.uint8).bitwise_and_(15)


class E3m0Codec(FourBitCodec):
    """Powers of two, rounded to the nearest of them, ties away from zero: small values keep their sign and size."""

    name: Literal["e3m0"] = "e3m0"
    LEVELS = 1
    LEAST_SCALE = 2.0**-120
    MOST_SCALE = torch.finfo(torch.float32).max
    _MAGNITUDES = (0.0, *(2.0 ** (e - 7) for e in range(1, 8)))
    VALUES = (*_MAGNITUDES, *(-m for m in _MAGNITUDES))

    def __init__(self) -> None:
        super().__init__()
        magnitudes = torch.tensor(self._MAGNITUDES)
        self._limits = (magnitudes[1:] + magnitudes[:-1]) / 2  # exact; from each on, the larger one

    def _codes(self, quotients: Tensor) -> Tensor:
        negative = quotients < 0
        codes = torch.bucketize(quotients.abs_(), self._limits, out_int32=True, right=True).to(torch.uint8)
        return codes.bitwise_or_((negative & (codes > 0)).to(torch.uint8) * SIGN)
