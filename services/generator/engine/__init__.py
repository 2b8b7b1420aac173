"""The engine: sequences, blocks, scheduling, sampling; synchronous below ``AsyncEngine``."""
