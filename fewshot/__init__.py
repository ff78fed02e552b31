"""Where pixels, random numbers and the records of a run come from. No algorithm is in here."""
