"""`python -m afina` is the `afina` command."""

from afina.cli import main

if __name__ == "__main__":
    main()
