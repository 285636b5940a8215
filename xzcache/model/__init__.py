"""Words that every room speaks: entries, byte ranges, metadata documents, validators, errors, a cache's contract.

Knows no other room, no file and no network. Its only state are the tables of fetches that are under way in a process
(`Flights`, `Claims`): each protects its own with a lock that is held for one dictionary operation.
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
    is_trouble,
    report_bug,
    translated,
    without_frames,
)
from xzcache.model.metadata import arrays_of, is_chunk, is_document, is_json, ruling, state_of, telling
from xzcache.model.singleflight import Claim, Claims, Flight, Flights, HandedOver, through
from xzcache.model.spans import NEGLIGIBLE, Cover, Listed, Mosaic, Span, cut, merged
from xzcache.model.validators import FIXED, beside, differ, fits, once, tells, told

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
    "Cover",
    "Damaged",
    "Data",
    "Entry",
    "Flight",
    "Flights",
    "Foreign",
    "HandedOver",
    "Listed",
    "Mosaic",
    "NoRoom",
    "Replaced",
    "Span",
    "Unclear",
    "Unusable",
    "arrays_of",
    "beside",
    "clip",
    "cut",
    "differ",
    "fits",
    "is_cacheable",
    "is_chunk",
    "is_document",
    "is_json",
    "is_trouble",
    "merged",
    "metadata",
    "namespace_of",
    "once",
    "report_bug",
    "ruling",
    "span",
    "state_of",
    "telling",
    "tells",
    "through",
    "told",
    "translated",
    "within",
    "without_frames",
]
