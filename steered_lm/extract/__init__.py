"""Contrast sets to activations to directions."""
