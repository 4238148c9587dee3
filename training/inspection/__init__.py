"""A page that shows what the router of a run does."""
