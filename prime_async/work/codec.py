"""How a vector of fp32 elements becomes the bytes of a contribution or a mean, and back.

A payload is little-endian, holds nothing but numbers, and has a size that follows from the number of elements.

``int8``, for n elements::

    offset            bytes            what
    0                 4 * ceil(n/256)  one fp32 scale per block of 256 elements; the last block may be shorter
    4 * ceil(n/256)   n                one signed byte q per element, -127 .. 127

Element i is ``q[i] * scale[i // 256]``, one fp32 multiplication. Scales come first: they are aligned without padding,
and a reader of a stream has them before the values that they scale. A scale is 0, or from 2^-126 to
``MAX_SCALE`` (the largest one whose 127-fold is finite): a payload that passes ``check`` decodes to finite numbers, and
to the same bits on every processor, denormals flushed or not.

``fp32``, for n elements: 4 n bytes, the elements as they are.

Both are deterministic, and round to nearest, ties to even. Multiplications and additions are separate operations:
fused forms (``addcmul``, ``alpha=``) round once where others round twice, and differ between processors.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from prime_async.errors import EnvironmentFault, NonFiniteError

CodecName = Literal["int8", "fp32"]

BLOCK = 256
LEVELS = 127
MIN_SCALE = 2.0**-126
"""The smallest normal fp32. A block whose scale would be below it (no element above 1.5e-36) becomes zero."""
MAX_SCALE = float.fromhex("0x1.020406p+121")
"""The largest fp32 whose 127-fold is finite in fp32: 2.679e36."""


class Codec(Protocol):
    """Fixed-size, deterministic encoding of fp32 vectors.

    Stateless: one object serves all threads. Tensors are contiguous, on the host, and overlap only where it says so.
    """

    @property
    def name(self) -> CodecName:
        """As the run spec writes it."""
        ...

    def payload_bytes(self, n: int) -> int:
        """Size of the payload of ``n`` elements."""
        ...

    def encode(self, values: Tensor, out: Tensor, scratch: Tensor) -> None:
        """Write ``values``, fp32 (n,), into ``out``, uint8 (payload_bytes(n),).

        ``scratch``, fp32 (n,), is overwritten; it may be ``values`` itself where they are not needed any more.
        Raises :class:`NonFiniteError` if an element is NaN or infinite; ``values`` are then as they were, and what
        ``out`` holds is undefined.
        """
        ...

    def check(self, payload: Tensor, n: int) -> str | None:
        """Why ``payload``, uint8, is not one of ``n`` elements, all finite when decoded; None if it is."""
        ...

    def decode(self, payload: Tensor, out: Tensor, weight: float = 1.0) -> None:
        """Write the elements times ``weight``, which must be a fp32 number, into ``out``, fp32 (n,).

        ``payload`` must have passed :meth:`check`.
        """
        ...


class Int8Codec:
    """Absolute maximum per block of 256 elements; see the module for the layout.

    The scale of a block is ``absmax / 127``, and q is ``round(x / scale)``: a true division, which is as fast here as
    a multiplication by the reciprocal and does not round twice. ``|x - q * scale| <= scale / 2`` plus one rounding.

    - A block of zeros has scale 0 and decodes to zeros. So does one whose scale would be denormal (all elements below
      1.5e-36): its values could exceed 127, and processors that flush denormals would decode something else.
    - A constant block comes back within one unit in the last place of fp32.
    - A block that reaches the largest fp32 has its scale limited to ``MAX_SCALE`` and comes back finite.
    - NaN or infinity anywhere raises :class:`NonFiniteError`.
    """

    name: CodecName = "int8"

    def payload_bytes(self, n: int) -> int:
        """Size of the payload of ``n`` elements."""
        return 4 * _block_count(n) + n

    def encode(self, values: Tensor, out: Tensor, scratch: Tensor) -> None:
        """See :meth:`Codec.encode`."""
        n = values.numel()
        scales = torch.empty(_block_count(n))
        # amax and amin read the values twice, and are still 20 times faster than aminmax over a dimension.
        for x, scale in zip(_blocks(values), _per_part(scales, n), strict=True):
            torch.maximum(torch.amax(x, 1), torch.amin(x, 1).neg_(), out=scale)  # NaN and infinity come through
        _require_finite(scales)
        scales.div_(LEVELS).clamp_(max=MAX_SCALE)
        scales.masked_fill_(scales < MIN_SCALE, 0.0)
        divisors = scales.masked_fill(scales == 0, 1.0)  # what it divides rounds to 0
        parts = zip(_blocks(values), _per_part(divisors, n), _blocks(scratch), _blocks(self._q(out, n)), strict=True)
        for x, divisor, quotient, q in parts:
            torch.div(x, divisor[:, None], out=quotient)
            q.copy_(quotient.round_())
        out[: 4 * scales.numel()].copy_(scales.view(torch.uint8))

    def check(self, payload: Tensor, n: int) -> str | None:
        """See :meth:`Codec.check`."""
        if (reason := _wrong_size(payload, self.payload_bytes(n))) or not n:
            return reason
        scales = self._scales(payload, n)
        low, high = float(scales.amin()), float(scales.amax())
        if not (np.isfinite(low) and np.isfinite(high)):
            return "a scale is NaN or infinite"
        if low < 0:
            return f"a scale is negative ({low})"
        if high > MAX_SCALE:
            return f"a scale ({high}) is above {MAX_SCALE}: values would decode to infinity"
        if bool(((scales > 0) & (scales < MIN_SCALE)).any()):
            return f"a scale is denormal: it must be 0 or at least {MIN_SCALE}"
        if int(self._q(payload, n).amin()) < -LEVELS:
            return "a value is -128: values go from -127 to 127"
        return None

    def decode(self, payload: Tensor, out: Tensor, weight: float = 1.0) -> None:
        """See :meth:`Codec.decode`. The weight is multiplied into the scales: ``q * (scale * weight)``."""
        n = out.numel()
        scales = self._scales(payload, n).mul_(weight)
        for x, q, scale in zip(_blocks(out), _blocks(self._q(payload, n)), _per_part(scales, n), strict=True):
            x.copy_(q)
            x.mul_(scale[:, None])

    @staticmethod
    def _scales(payload: Tensor, n: int) -> Tensor:
        """A copy, fp32 (blocks,): the payload may lie at any address."""
        scales = torch.empty(_block_count(n))
        scales.view(torch.uint8).copy_(payload[: 4 * scales.numel()])
        return scales

    @staticmethod
    def _q(payload: Tensor, n: int) -> Tensor:
        return payload[4 * _block_count(n) :].view(torch.int8)


class Fp32Codec:
    """The elements as they are: zero, denormal, constant and huge ones come back bit for bit.

    NaN or infinity raises :class:`NonFiniteError`.
    """

    name: CodecName = "fp32"

    def payload_bytes(self, n: int) -> int:
        """Size of the payload of ``n`` elements."""
        return 4 * n

    def encode(self, values: Tensor, out: Tensor, scratch: Tensor) -> None:  # noqa: ARG002  (needs no scratch)
        """See :meth:`Codec.encode`."""
        _require_finite(_extremes(values))
        out.copy_(_raw(values))

    def check(self, payload: Tensor, n: int) -> str | None:
        """See :meth:`Codec.check`."""
        if reason := _wrong_size(payload, self.payload_bytes(n)):
            return reason
        aligned = payload if payload.data_ptr() % 4 == 0 else payload.clone()
        finite = torch.isfinite(_extremes(aligned.view(torch.float32))).all()
        return None if bool(finite) else "an element is NaN or infinite"

    def decode(self, payload: Tensor, out: Tensor, weight: float = 1.0) -> None:
        """See :meth:`Codec.decode`."""
        _raw(out).copy_(payload)
        if weight != 1.0:
            out.mul_(weight)


def make_codec(name: CodecName) -> Codec:
    """The codec that the run spec calls ``name``.

    Raises :class:`EnvironmentFault` on a big-endian machine, where a payload would have to be turned around.
    """
    if sys.byteorder != "little":
        raise EnvironmentFault("this machine is big-endian; payloads are little-endian: use a little-endian machine")
    codecs: dict[CodecName, Callable[[], Codec]] = {"int8": Int8Codec, "fp32": Fp32Codec}
    return codecs[name]()


def as_tensor(buffer: memoryview) -> Tensor:
    """``buffer`` as a uint8 tensor (bytes,) that shares its memory and keeps it alive.

    Works for read-only buffers too, such as a received frame, which ``torch.frombuffer`` and ``torch.from_numpy`` warn
    of: who passes one must not write to the tensor.
    """
    array = np.frombuffer(buffer, np.uint8)
    if not array.size:
        return torch.empty(0, dtype=torch.uint8)  # torch.frombuffer refuses an empty buffer
    raw = (ctypes.c_uint8 * array.size).from_address(array.ctypes.data)
    raw.owner = array  # type: ignore[attr-defined]  # from_address borrows: the tensor holds raw, raw holds the memory
    return torch.frombuffer(raw, dtype=torch.uint8)


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host, as bytes; not a copy."""
    return tensor.numpy().data.cast("B")


def _raw(values: Tensor) -> Tensor:
    """fp32 (n,) as uint8 (4 n,). An empty tensor may have stride 0, which ``view`` refuses."""
    return values.view(torch.uint8) if values.numel() else torch.empty(0, dtype=torch.uint8)


def _block_count(n: int) -> int:
    return -(-n // BLOCK)


def _blocks(flat: Tensor) -> list[Tensor]:
    """(n,) as its whole blocks (n // 256, 256) and, if there is a rest, the last block (1, n % 256)."""
    whole = flat.numel() // BLOCK * BLOCK
    parts = [flat[:whole].view(-1, BLOCK), flat[whole:].view(1, -1)]
    return [part for part in parts if part.numel()]


def _per_part(per_block: Tensor, n: int) -> list[Tensor]:
    """(blocks,) divided as :func:`_blocks` divides ``n`` elements."""
    return [part for part in (per_block[: n // BLOCK], per_block[n // BLOCK :]) if part.numel()]


def _extremes(values: Tensor) -> Tensor:
    """The least and the greatest element, (2,), or (0,) if there is none; NaN if one is NaN.

    Three passes of ``isfinite`` and ``all`` would take ten times as long.
    """
    return torch.stack([values.amin(), values.amax()]) if values.numel() else values


def _require_finite(values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError("the values to encode hold NaN or infinity: this node's training has diverged")


def _wrong_size(payload: Tensor, expected: int) -> str | None:
    return None if payload.numel() == expected else f"{payload.numel()} bytes instead of {expected}"
