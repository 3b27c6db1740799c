"""The report of a run: one HTML file that needs nothing else, and its charts as pictures. Knows no MLX."""

from __future__ import annotations

from opd_daemon.distill.report.page import write_report

__all__ = ["write_report"]
