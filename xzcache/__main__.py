"""``python -m xzcache``: the command ``xzcache``."""

from xzcache.cli import main

main()
