"""`python -m lightning_hybrid.cli`."""

from lightning_hybrid.cli.commands import main

if __name__ == "__main__":
    main()
