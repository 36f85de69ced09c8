"""What the driver does between two steps, and when a run ends early."""
