"""Tasks, one module each: where prompts come from, how replies stand in text, how to contrast and to judge them."""
