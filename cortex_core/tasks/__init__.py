"""Text tasks through any tokenizer: facts, an exact gap, a question; and real text to hide them in."""
