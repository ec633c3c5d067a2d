"""A model over HTTP: the page and the OpenAI chat format that `unimoe serve` runs."""
