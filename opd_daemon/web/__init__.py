"""The web port: figures for Prometheus and a page for people, on the loopback interface (extra `web`)."""
