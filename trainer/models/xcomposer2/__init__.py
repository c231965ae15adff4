"""InternLM-XComposer2, self-contained: these files are saved beside the weights and load there by themselves."""
