"""Trait vectors, steering specs, decoder-block lookup and the hooks that apply them."""
