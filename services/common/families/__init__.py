"""Torch-free records of what differs between model families, for encoder and generator alike."""
