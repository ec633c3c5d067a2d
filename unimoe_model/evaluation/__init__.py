"""What a trained model gets right, and the pictures that show it."""
