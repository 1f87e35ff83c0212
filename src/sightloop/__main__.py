"""`python -m sightloop` is the command `sightloop`."""

from sightloop.apps.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
