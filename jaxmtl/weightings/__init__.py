"""Rules on the Gramian, one file per rule or pair of sister rules."""
