"""Mergers: what becomes of the tokens that are evicted."""
