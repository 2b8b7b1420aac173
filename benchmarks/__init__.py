"""Measurements that are reported, never asserted by the test suite."""
