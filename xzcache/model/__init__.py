"""Words that every room speaks: entries, byte ranges, metadata documents, validators, errors, a cache's contract.

Knows no other room, no file and no network. Its state are the tables of fetches that are under way in a process
(`Flights`, `Claims`), each under a lock that is never held while anything is waited for, and which errors of the code
were logged.
"""

from xzcache.model import metadata
from xzcache.model.backend import Backend
from xzcache.model.entry import END, META, Data, Entry, clip, is_cacheable, namespace_of, span, within
from xzcache.model.errors import (
    Busy,
    CacheFault,
    Damaged,
    Foreign,
    NoRoom,
    Replaced,
    Unclear,
    Unusable,
    is_expected_fault,
    report_bug,
    translated,
    without_frames,
)
from xzcache.model.metadata import (
    array_documents,
    arrays_of,
    fingerprint,
    is_chunk,
    is_document,
    is_json,
    overriding_document,
)
from xzcache.model.singleflight import Claim, Claims, Flight, Flights, LeaderCancelled, run_to_completion
from xzcache.model.spans import NEGLIGIBLE, IntervalSet, Listed, Span, SparseBuffer, cut, merged
from xzcache.model.validators import (
    FIXED,
    adopt_session,
    are_compatible,
    differ,
    from_source,
    is_from_source,
    session_validator,
)

__all__ = [
    "END",
    "FIXED",
    "META",
    "NEGLIGIBLE",
    "Backend",
    "Busy",
    "CacheFault",
    "Claim",
    "Claims",
    "Damaged",
    "Data",
    "Entry",
    "Flight",
    "Flights",
    "Foreign",
    "IntervalSet",
    "LeaderCancelled",
    "Listed",
    "NoRoom",
    "Replaced",
    "Span",
    "SparseBuffer",
    "Unclear",
    "Unusable",
    "adopt_session",
    "are_compatible",
    "array_documents",
    "arrays_of",
    "clip",
    "cut",
    "differ",
    "fingerprint",
    "from_source",
    "is_cacheable",
    "is_chunk",
    "is_document",
    "is_expected_fault",
    "is_from_source",
    "is_json",
    "merged",
    "metadata",
    "namespace_of",
    "overriding_document",
    "report_bug",
    "run_to_completion",
    "session_validator",
    "span",
    "translated",
    "within",
    "without_frames",
]
