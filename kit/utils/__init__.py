"""Small things that every room may use: interrupts, files, hardware, formatting, imports."""
