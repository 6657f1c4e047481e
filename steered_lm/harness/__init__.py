"""What steered-lm is inside lm-evaluation-harness: the model type ``steered-hf``, its tasks, and the objective that a search calls.

This is the only room that imports ``lm_eval``; nothing is imported before it is used.
"""
