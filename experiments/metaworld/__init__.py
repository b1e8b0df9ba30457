"""Meta-World: one agent learns several tasks of a robot arm, a rule in its critic and its actor."""
