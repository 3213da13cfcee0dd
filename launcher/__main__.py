"""`python -m launcher` is `fleetune`."""

from launcher.cli import main

main()
