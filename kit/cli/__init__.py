"""The `kit` command: `app.py` puts together the commands of the other modules."""
