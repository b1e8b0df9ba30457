"""What comes before an aggregator: row transforms, which keep the task axis, and accumulation."""
