"""Media and conversations, as they are read, encoded and mixed."""
