"""Which entries leave first: the policies, what they learn from, and the uses that are not in the index yet.

Touches no entry file. State: the uses that this process has heard of, in a dictionary that a hit adds to without a lock
and that is taken under the mutex of `Recency`; what `"adaptive"` has learned lies in the index, changes in its
transactions, and is kept by each process as it was last read.
"""

from xzcache.eviction._curve import Sample, predicted
from xzcache.eviction._policies import POLICIES, Policy
from xzcache.eviction._recency import Recency, recency_for

__all__ = [
    "POLICIES",
    "Policy",
    "Recency",
    "Sample",
    "predicted",
    "recency_for",
]
