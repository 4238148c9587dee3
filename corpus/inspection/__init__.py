"""What is in data, for people to look at."""
