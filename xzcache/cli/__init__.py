"""The command ``xzcache``: see, clear, size and check a cache from a terminal or a script.

Keeps no state and takes no lock: it calls the functions of `xzcache.manage` and shows their results. Only this room
imports click, and rich where it is installed and a person reads.
"""

from xzcache.cli._commands import cli, main

__all__ = ["cli", "main"]
