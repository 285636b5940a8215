"""``python -m xzcache``: the command ``xzcache``."""

from xzcache.cli import main

if __name__ == "__main__":
    main()
