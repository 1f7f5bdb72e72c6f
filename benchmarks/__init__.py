"""What the kit measures itself against, side by side in one run."""
