"""``python -m mixer`` is the command ``mixer``."""

from mixer.cli import main

if __name__ == "__main__":
    main()
