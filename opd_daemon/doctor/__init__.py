"""What may be wrong with an installation, a machine or a home, each finding with its cure.

A check is a function that returns findings and raises nothing; `examine` does them all.
"""

from __future__ import annotations

from opd_daemon.doctor.examination import examine
from opd_daemon.doctor.finding import Finding, Level

__all__ = ["Finding", "Level", "examine"]
