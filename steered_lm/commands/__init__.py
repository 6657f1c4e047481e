"""Groups of commands of ``steered-lm``, one module a command."""
