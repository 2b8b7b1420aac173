"""Command line of Chiasm: start services, supervise a local stack, probe health."""
