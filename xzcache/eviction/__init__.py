"""Which entries leave first: the policies, what they learn from, and the uses that are not in the index yet.

This room touches no entry file. Its state: the uses that this process has recorded, in a dictionary that a hit adds to
without a lock and that is taken under the mutex of `Recency`; and the learned state of `"adaptive"`, which lies in the
index and changes in its transactions. Each process keeps the learned state as it last read it.
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
