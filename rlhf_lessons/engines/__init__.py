"""Samplers by another engine, imported only when asked for."""
