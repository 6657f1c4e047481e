"""What steering does to plain text: perplexity, distance to the unsteered model, variety, repetition and length."""
