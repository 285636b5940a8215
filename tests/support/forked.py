"""What workers of Dask import that come from a fork server, so that they begin and end as an interpreter does.

They read the environment that their nanny gives them: the server has read its own. And they leave their caches at the
end: a process that was forked from a server ends without what was registered for the end of an interpreter.
"""

from multiprocessing.util import Finalize

import xzcache

xzcache.config.refresh()
Finalize(None, xzcache.cleanup_resources, exitpriority=0)
