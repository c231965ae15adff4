"""InternLM-XComposer2. These files import nothing of the project: they are saved beside the weights."""
