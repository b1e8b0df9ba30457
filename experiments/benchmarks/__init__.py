"""Measurements of time, memory and operations."""
