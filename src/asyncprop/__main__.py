"""`python -m asyncprop`: the command."""

from asyncprop.cli import main

if __name__ == "__main__":  # processes that multiprocessing spawns import this module again
    main()
