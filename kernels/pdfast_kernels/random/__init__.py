"""Stateless random numbers."""
