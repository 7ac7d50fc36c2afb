"""What is known of categories, and the search in it."""
