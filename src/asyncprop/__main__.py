"""`python -m asyncprop`: the command."""

import os
import sys


def run() -> None:
    """Run the command; a rank's process that has done its work ends with it, without what Python does at its end.

    By then all is written and told. But a thread of gloo's that lets go of a tensor while Python ends is ended in the
    midst of C++, and the process aborts: one in some hundreds, also after the process group was destroyed.
    """
    try:
        from asyncprop.cli import main  # here: a Ctrl-C may come while it is imported

        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except SystemExit as end:
        if end.code or "RANK" not in os.environ:
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":  # processes that multiprocessing spawns import this module again
    run()
