"""`python -m opd_daemon.cli` is `opd`."""

from opd_daemon.cli.main import main

main()
