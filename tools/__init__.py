"""What measures and reports; run as `python -m tools.NAME`."""
