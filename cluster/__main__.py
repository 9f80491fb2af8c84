"""``python -m cluster`` is ``sparsyfed``; a Ctrl-C while it is still being loaded ends it in one word too."""

import sys


def main() -> int:
    """Run the command line; the exit status."""
    try:
        from cluster.cli import main as command

        return command()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
