"""Text tasks through any tokenizer: facts, a gap of exact length, a question; and the real text they are hidden in."""
