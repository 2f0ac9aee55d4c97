"""Dreams: walks over what was written, scenarios and answers that the model decodes itself, and a judge of them."""
