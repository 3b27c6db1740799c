"""Stubs of the contract in `proto/opd_daemon/v1`, written by `make proto`; never edited by hand."""
