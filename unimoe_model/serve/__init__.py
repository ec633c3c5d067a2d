"""HTTP server of a model: the web page and the OpenAI chat API of `unimoe serve`."""
