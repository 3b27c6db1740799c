"""Runs: accepting them, doing them one after another in worker processes, and surviving what happens there."""
