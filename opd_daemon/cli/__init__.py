"""The command line: thin, on the client. Heavy modules are imported where they are used, so `opd --help` is instant."""
