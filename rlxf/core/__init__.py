"""What every part may import."""
