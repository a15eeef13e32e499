"""Brute-force enumerators, one per quantity, in float64."""
