"""Conversion between the contract's messages and the domain types, for daemon, client and worker."""
