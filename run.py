"""``python run.py method=snapkv task=longbench`` from a checkout; the installed command is ``kvbench run``."""

from kvbench.runners.cli import main

if __name__ == "__main__":
    main()
