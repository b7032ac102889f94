"""Frozen records that the stages hand to each other; each is imported from its own module."""
