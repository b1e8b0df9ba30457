"""Molecules: eleven properties of a molecule from one network, by every method."""
