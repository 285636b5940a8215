"""The keywords of `open_zarr` and `open_mfdataset`: their types, and the signature and text that `help` shows.

Which keywords xarray has depends on its version: the types here are those of the newest one, and what `help` shows is
composed of the versions that are installed. A test compares both with `CacheStore` and xarray.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, TypedDict

from xzcache._config import UNSET
from xzcache.store import CacheStore

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Sequence

    from xarray import DataArray, Dataset, Index
    from xarray.coders import CFDatetimeCoder, CFTimedeltaCoder
    from xarray.core.types import CombineAttrsOptions, CompatOptions, ErrorOptionsWithWarn, JoinOptions, T_Chunks
    from zarr.abc.store import Store

    from xzcache._config import Age, PolicyName, Revalidate, Unset, Upstream
    from xzcache.sources import SourceLike

    Paths: TypeAlias = SourceLike | Sequence[SourceLike | Sequence[SourceLike | Sequence[SourceLike]]]


class CacheKeywords(TypedDict, total=False):
    """What `CacheStore` accepts beside its source, and `pipeline`."""

    cache_store: Store | str | os.PathLike[str] | None
    max_age_seconds: Age | Unset
    max_size: int | str | Unset | None
    cache_set_data: bool | Unset
    read_only: bool
    namespace: str | None
    revalidate: Revalidate | Unset
    missing_max_age_seconds: Age | Unset
    policy: PolicyName | Unset
    storage_options: Mapping[str, Any] | None
    upstream: Upstream | Unset
    pipeline: bool | Unset


class DecodingKeywords(TypedDict, total=False):
    """What xarray accepts wherever it opens a Zarr dataset."""

    group: str | None
    decode_cf: bool | None
    mask_and_scale: bool | Mapping[str, bool] | None
    decode_times: bool | CFDatetimeCoder | Mapping[str, bool | CFDatetimeCoder] | None
    decode_timedelta: bool | CFTimedeltaCoder | Mapping[str, bool | CFTimedeltaCoder] | None
    use_cftime: bool | Mapping[str, bool] | None
    concat_characters: bool | Mapping[str, bool] | None
    decode_coords: Literal["coordinates", "all"] | bool | None
    drop_variables: str | Iterable[str] | None
    create_default_indexes: bool
    chunked_array_type: str | None
    from_array_kwargs: dict[str, Any] | None
    consolidated: bool | None
    zarr_format: int | None
    use_zarr_fill_value_as_mask: bool | None
    engine: Literal["zcache", "xzcache"] | None


class OpenZarrKeywords(CacheKeywords, DecodingKeywords, total=False):
    """What `open_zarr` accepts."""

    chunks: int | dict[Any, Any] | Literal["auto"] | None
    overwrite_encoded_chunks: bool


class OpenMfdatasetKeywords(CacheKeywords, DecodingKeywords, total=False):
    """What `open_mfdataset` accepts."""

    chunks: T_Chunks
    concat_dim: str | DataArray | Index | Sequence[str] | Sequence[DataArray] | Sequence[Index] | None
    compat: CompatOptions
    preprocess: Callable[[Dataset], Dataset] | None
    data_vars: Literal["all", "minimal", "different"] | list[str] | None
    coords: Literal["all", "minimal", "different"] | list[str]
    combine: Literal["by_coords", "nested"]
    parallel: bool
    join: JoinOptions
    attrs_file: str | os.PathLike[str] | None
    combine_attrs: CombineAttrsOptions
    errors: ErrorOptionsWithWarn
    cache: bool | None
    inline_array: bool
    backend_kwargs: dict[str, Any] | None


_ADDED: Final = {
    "pipeline": """pipeline : bool, optional
    Whether `xzcache.pipeline.CachePipeline` decodes cached chunks. Configured: True.""",
    "engine": """engine : {"zcache", "xzcache"}, optional
    The name of this engine; no other one is accepted.""",
}
_PARAMETERS: Final = re.compile(r"^Parameters\n-+\n(.*?)\n\n(?=\w[^\n]*\n-+\n)", re.MULTILINE | re.DOTALL)
_ENTRY: Final = re.compile(r"^(\w+)[^\n]*(?:\n+ [^\n]*)*", re.MULTILINE)


def _entries(documented: Any) -> dict[str, str]:
    """The entries of the section Parameters of a docstring, by the names of their parameters."""
    found = _PARAMETERS.search(inspect.cleandoc(documented.__doc__ or ""))
    return {entry[1]: entry[0] for entry in _ENTRY.finditer(found[1] if found else "")}


def tell_all(ours: Callable[..., Any], types: Any, *theirs: Callable[..., Any]) -> frozenset[str]:
    """Give a function a signature and a docstring of all keywords: xarray's, and those of `CacheStore`.

    Parameters
    ----------
    ours : Callable
        The function. Its docstring has a section Parameters with its first parameter only.
    types : type
        The `TypedDict` of its keywords.
    theirs : Callable
        The functions of xarray that get the keywords; only the first one gets arguments by position.

    Returns
    -------
    frozenset of str
        The names of all parameters.
    """
    first = next(iter(inspect.signature(ours).parameters.values()))
    hidden = {"self", "store", "filename_or_obj", "paths", "engine", "mode", first.name}
    found, told = {first.name: first}, dict(_ADDED)
    for function in (*theirs, CacheStore):
        told = {**_entries(function), **told}
        for name, each in inspect.signature(function).parameters.items():
            is_named = each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY) and name not in hidden
            if is_named and name not in found:
                found[name] = each if function is theirs[0] else each.replace(kind=each.KEYWORD_ONLY)
    for name in _ADDED:
        default = UNSET if name == "pipeline" else None
        found[name] = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
    types = {name: getattr(value, "__forward_arg__", value) for name, value in types.__annotations__.items()}
    typed = [each.replace(annotation=types.get(name, each.annotation)) for name, each in found.items()]
    before, own, after = re.split(
        r"(?<=^Parameters\n----------\n)(.*?\n)(?=\n)",
        inspect.cleandoc(ours.__doc__ or ""),
        maxsplit=1,
        flags=re.M | re.S,
    )
    entries = [told.get(name, f"{name} : optional\n    As in xarray.") for name in found if name != first.name]
    vars(ours)["__signature__"] = inspect.Signature(typed, return_annotation="Dataset")
    ours.__doc__ = before + own + "\n".join(entries) + "\n" + after
    return frozenset(found)
