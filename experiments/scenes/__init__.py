"""Scene understanding: NYUv2 and Cityscapes by every method of the papers' tables."""
