"""``python -m leafseg``, which launchers of several processes need."""

from leafseg.cli import main

main()
