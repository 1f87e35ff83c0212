"""`python -m sightread` is the command `sightread`."""

from sightread.apps.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
