"""The Inspect plugin: the ``steered-hf`` model provider and the ``persona_judge`` task. The only room that imports inspect_ai."""
