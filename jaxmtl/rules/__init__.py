"""The methods: one file per rule or pair of sister rules, whatever they read."""
