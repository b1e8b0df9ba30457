"""Rules on the losses, one file per rule or pair of sister rules."""
