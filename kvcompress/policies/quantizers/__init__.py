"""Quantizers: in how many bits the slots are stored."""
