"""`python -m tessera`, as torchrun needs it."""

from tessera.cli import main

if __name__ == "__main__":
    main()
