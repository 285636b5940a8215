"""What workers of Dask import that come from a fork server: they leave their caches at the end, as an interpreter does.

A process that was forked from a server ends without what was registered for the end of an interpreter.
"""

from multiprocessing.util import Finalize

import xzcache

Finalize(None, xzcache.cleanup_resources, exitpriority=0)
