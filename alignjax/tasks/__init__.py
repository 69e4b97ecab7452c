"""One file a task: its prompts, contrast, format and oracle."""
