"""`python -m kvcompress` is the command `kvcompress`."""

from kvcompress.cli import main

if __name__ == "__main__":
    main()
