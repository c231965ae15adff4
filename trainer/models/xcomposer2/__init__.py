"""InternLM-XComposer2. These files import nothing else of the project: they are saved with the weights."""
