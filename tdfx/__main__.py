"""``python -m tdfx`` is the command ``tdfx``."""

from tdfx.cli import main

if __name__ == "__main__":
    main()
