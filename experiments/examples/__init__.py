"""One model in four frameworks, each trained by the same optimizer, and notes for migrants."""
