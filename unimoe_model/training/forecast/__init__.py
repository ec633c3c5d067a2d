"""What a run needs: memory of every stage, devices that it fits on, tokens, hours and disk."""
