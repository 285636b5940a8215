"""From a URL to a store, the identity of a source in every process, and conditional requests to it.

State: the identities of known stores, under the lock of their table; the sources that could not be reached and the
devices of local ones, in dictionaries that change by single operations. Credentials stay in the stores and the
libraries that read them: no message shows an option or a URL with a credential.
"""

from xzcache.sources._conditional import FetchResult, all_of, fetch, fetch_spans
from xzcache.sources._identity import Identity, identify, is_same_source, must_identify_again, remember, slug_of
from xzcache.sources._obstore import OPTIONS
from xzcache.sources._open import (
    SourceLike,
    WebStore,
    as_xarray,
    folder_of,
    format_by_name,
    is_at_hand,
    is_url,
    local_path,
    open_source,
    path_of,
    spelled,
)
from xzcache.sources._outage import (
    Reach,
    in_short,
    is_deleted,
    is_of_a_client,
    is_outage,
    reach_of,
    remember_place,
)
from xzcache.sources._urls import scrub, shown

__all__ = [
    "OPTIONS",
    "FetchResult",
    "Identity",
    "Reach",
    "SourceLike",
    "WebStore",
    "all_of",
    "as_xarray",
    "fetch",
    "fetch_spans",
    "folder_of",
    "format_by_name",
    "identify",
    "in_short",
    "is_at_hand",
    "is_deleted",
    "is_of_a_client",
    "is_outage",
    "is_same_source",
    "is_url",
    "local_path",
    "must_identify_again",
    "open_source",
    "path_of",
    "reach_of",
    "remember",
    "remember_place",
    "scrub",
    "shown",
    "slug_of",
    "spelled",
]
