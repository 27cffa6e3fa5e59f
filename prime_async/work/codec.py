"""How a vector of fp32 elements becomes the bytes of a contribution or a mean, and back.

A payload is little-endian, holds nothing but numbers, and has a size that follows from the number of elements; but for
that of ``sparse``, which means alone have.

``int8``, for n elements::

    offset            bytes            what
    0                 4 * ceil(n/256)  one fp32 scale per block of 256 elements; the last block may be shorter
    4 * ceil(n/256)   n                one signed byte q per element, -127 .. 127

Element i is ``q[i] * scale[i // 256]``, one fp32 multiplication. Scales come first: they are aligned without padding,
and a reader of a stream has them before the values that they scale. A scale is 0, or from 2^-126 to
``MAX_SCALE`` (the largest one whose 127-fold is finite): a payload that passes ``check`` decodes to finite numbers, and
to the same bits on every processor, denormals flushed or not.

``fp32``, for n elements: 4 n bytes, the elements as they are. ``fp16``: 2 n bytes, IEEE 754 binary16.

``int4`` and ``e3m0``: see :mod:`prime_async.work.codec_4bit`; ``topk``: :mod:`prime_async.work.codec_topk`;
``sparse``: :mod:`prime_async.work.codec_sparse`.

All are deterministic; ``e3m0`` aside they round to nearest, ties to even. Multiplications and additions are separate
operations: fused forms (``addcmul``, ``alpha=``) round once where others round twice, and differ between processors.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from prime_async.config.schema import CodecName as CodecName
from prime_async.errors import EnvironmentFault
from prime_async.work.block_scales import (
    absmax_scales,
    block_count,
    blocks,
    divide,
    per_part,
    read_scales,
    require_finite,
    write_scales,
    wrong_scales,
    wrong_size,
)
from prime_async.work.codec_4bit import E3m0Codec, Int4Codec
from prime_async.work.codec_sparse import SparseCodec
from prime_async.work.codec_topk import TopkCodec

LEVELS = 127
MIN_SCALE = 2.0**-126
"""The smallest normal fp32. A block whose scale would be below it (no element above 1.5e-36) becomes zero."""
MAX_SCALE = float.fromhex("0x1.020406p+121")
"""The largest fp32 whose 127-fold is finite in fp32: 2.679e36."""


class Codec(Protocol):
    """Deterministic encoding of fp32 vectors, of a fixed size in all codecs but ``sparse``.

    Stateless: one object serves all threads. Tensors are contiguous, on the host, and overlap only where it says so.
    """

    @property
    def name(self) -> CodecName:
        """As the run spec writes it."""
        ...

    def payload_bytes(self, n: int) -> int:
        """Size of the payload of ``n`` elements; of ``sparse`` the largest that it can have."""
        ...

    def encode(self, values: Tensor, out: Tensor, scratch: Tensor) -> int:
        """Write ``values``, fp32 (n,), into ``out``, uint8 (payload_bytes(n),). Returns the size of the payload.

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
        return 4 * block_count(n) + n

    def encode(self, values: Tensor, out: Tensor, scratch: Tensor) -> int:
        """See :meth:`Codec.encode`."""
        n = values.numel()
        scales = absmax_scales(values, LEVELS, MIN_SCALE, MAX_SCALE)
        divide(values, scales, scratch)
        self._q(out, n).copy_(scratch.round_())
        write_scales(scales, out)
        return out.numel()

    def check(self, payload: Tensor, n: int) -> str | None:
        """See :meth:`Codec.check`."""
        if (reason := wrong_size(payload, self.payload_bytes(n))) or not n:
            return reason
        if reason := wrong_scales(read_scales(payload, n), MIN_SCALE, MAX_SCALE):
            return reason
        if int(self._q(payload, n).amin()) < -LEVELS:
            return "a value is -128: values go from -127 to 127"
        return None

    def decode(self, payload: Tensor, out: Tensor, weight: float = 1.0) -> None:
        """See :meth:`Codec.decode`. The weight is multiplied into the scales: ``q * (scale * weight)``."""
        n = out.numel()
        scales = read_scales(payload, n).mul_(weight)
        for x, q, scale in zip(blocks(out), blocks(self._q(payload, n)), per_part(scales, n), strict=True):
            x.copy_(q)
            x.mul_(scale[:, None])

    @staticmethod
    def _q(payload: Tensor, n: int) -> Tensor:
        return payload[4 * block_count(n) :].view(torch.int8)


class Fp32Codec:
    """The elements as they are: zero, denormal, constant and huge ones come back bit for bit.

    NaN or infinity raises :class:`NonFiniteError`.
    """

    name: CodecName = "fp32"

    def payload_bytes(self, n: int) -> int:
        """Size of the payload of ``n`` elements."""
        return 4 * n

    def encode(self, values: Tensor, out: Tensor, scratch: Tensor) -> int:  # noqa: ARG002  (needs no scratch)
        """See :meth:`Codec.encode`."""
        require_finite(_extremes(values))
        out.copy_(_raw(values))
        return out.numel()

    def check(self, payload: Tensor, n: int) -> str | None:
        """See :meth:`Codec.check`."""
        if reason := wrong_size(payload, self.payload_bytes(n)):
            return reason
        aligned = payload if payload.data_ptr() % 4 == 0 else payload.clone()
        finite = torch.isfinite(_extremes(aligned.view(torch.float32))).all()
        return None if bool(finite) else "an element is NaN or infinite"

    def decode(self, payload: Tensor, out: Tensor, weight: float = 1.0) -> None:
        """See :meth:`Codec.decode`."""
        _raw(out).copy_(payload)
        if weight != 1.0:
            out.mul_(weight)


class Fp16Codec:
    """IEEE 754 binary16, rounded to nearest, ties to even; what is beyond its largest, 65,504, becomes that.

    NaN or infinity raises :class:`NonFiniteError`. The relative error is at most 2^-11 from 2^-14 (6.1e-5) upwards;
    below that the absolute one is at most 2^-25. It has no scales: int8 is more exact for small values.
    """

    name: CodecName = "fp16"

    def payload_bytes(self, n: int) -> int:
        """Size of the payload of ``n`` elements."""
        return 2 * n

    def encode(self, values: Tensor, out: Tensor, scratch: Tensor) -> int:
        """See :meth:`Codec.encode`."""
        require_finite(_extremes(values))
        limit = torch.finfo(torch.float16).max
        torch.clamp(values, -limit, limit, out=scratch)
        out.copy_(_raw(scratch.to(torch.float16)))
        return out.numel()

    def check(self, payload: Tensor, n: int) -> str | None:
        """See :meth:`Codec.check`."""
        if reason := wrong_size(payload, self.payload_bytes(n)):
            return reason
        finite = torch.isfinite(_extremes(self._elements(payload))).all()
        return None if bool(finite) else "an element is NaN or infinite"

    def decode(self, payload: Tensor, out: Tensor, weight: float = 1.0) -> None:
        """See :meth:`Codec.decode`."""
        out.copy_(self._elements(payload))
        if weight != 1.0:
            out.mul_(weight)

    @staticmethod
    def _elements(payload: Tensor) -> Tensor:
        aligned = payload if payload.data_ptr() % 2 == 0 else payload.clone()
        return aligned.view(torch.float16) if payload.numel() else torch.empty(0, dtype=torch.float16)


def make_codec(name: CodecName) -> Codec:
    """The codec that the run spec calls ``name``.

    Raises :class:`EnvironmentFault` on a big-endian machine, where a payload would have to be turned around.
    """
    if sys.byteorder != "little":
        raise EnvironmentFault("this machine is big-endian; payloads are little-endian: use a little-endian machine")
    codecs: dict[CodecName, Callable[[], Codec]] = {
        "int8": Int8Codec,
        "int4": Int4Codec,
        "e3m0": E3m0Codec,
        "fp16": Fp16Codec,
        "fp32": Fp32Codec,
        "topk": TopkCodec,
        "sparse": SparseCodec,
    }
    return codecs[name]()


def mean_payload_bytes(codec: Codec, n: int, contributors: int) -> int:
    """The size to expect of a mean of ``n`` elements in ``codec``; of ``sparse`` one of so many contributors."""
    return codec.usual_bytes(n, contributors) if isinstance(codec, SparseCodec) else codec.payload_bytes(n)


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
    """(n,) as uint8 bytes. An empty tensor may have stride 0, which ``view`` refuses."""
    return values.view(torch.uint8) if values.numel() else torch.empty(0, dtype=torch.uint8)


def _extremes(values: Tensor) -> Tensor:
    """The least and the greatest element, (2,), or (0,) if there is none; NaN if one is NaN.

    Three passes of ``isfinite`` and ``all`` would take ten times as long.
    """
    return torch.stack([values.amin(), values.amax()]) if values.numel() else values
