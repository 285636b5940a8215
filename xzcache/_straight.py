"""Chunks whose bytes are the values themselves: they may be read straight into the array that somebody asked for."""

from __future__ import annotations

import sys
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from zarr.codecs import BytesCodec

if TYPE_CHECKING:
    from zarr.abc.codec import Codec
    from zarr.core.array_spec import ArraySpec
    from zarr.core.buffer import NDBuffer

_KINDS = frozenset("biufc")
"""Of data types whose every value is as many bytes as the next, and nothing else."""


def stores_values(codecs: tuple[Codec, ...]) -> bool:
    """Whether an array is stored as its values lie in memory: uncompressed, and in the byte order of this machine."""
    if len(codecs) != 1 or type(codecs[0]) is not BytesCodec:
        return False
    endian: Any = codecs[0].endian
    return endian is None or getattr(endian, "value", endian) == sys.byteorder


def place_of(spec: ArraySpec, chunk_selection: Any, out: NDBuffer, out_selection: Any) -> np.ndarray[Any, Any] | None:
    """Where in a result the bytes of a chunk are to lie; None where they are not all there, and in order.

    Parameters
    ----------
    spec : ArraySpec
        Of the chunk.
    chunk_selection : selection
        What is wanted of the chunk.
    out : NDBuffer
        The result.
    out_selection : selection
        Where in the result that is.
    """
    values: Any = out.as_ndarray_like()
    if type(values) is not np.ndarray or not (_is_plain(chunk_selection) and _is_plain(out_selection)):
        return None
    dtype: np.dtype[Any] = values.dtype
    if dtype.kind not in _KINDS or not dtype.isnative or spec.dtype.to_native_dtype() != dtype:
        return None
    place: Any = values[out_selection]
    # steps of one, and as many values as the chunk has: it is the whole of it, but for axes of length one
    if type(place) is not np.ndarray or place.size != prod(spec.shape) or not place.flags.c_contiguous:
        return None
    return place.reshape(-1).view(np.uint8)


def _is_plain(selection: Any) -> bool:
    parts = selection if isinstance(selection, tuple) else (selection,)
    return all(
        isinstance(part, int) or (type(part) is slice and part.step in (None, 1) and (part.start or 0) >= 0)
        for part in parts
    )
