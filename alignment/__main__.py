"""`python -m alignment` is `alignment`."""

from alignment.cli import run

if __name__ == "__main__":
    run()
