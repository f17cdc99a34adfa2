"""``python -m mambax.cli``: the command line where no ``mambax`` is on the path."""

from mambax.cli.app import main

if __name__ == "__main__":
    main()
