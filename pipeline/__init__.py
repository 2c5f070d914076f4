"""Tally: usage events in, invoice lines out, every line proved."""
