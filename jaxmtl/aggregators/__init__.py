"""Rules that need the coordinates of the gradients."""
