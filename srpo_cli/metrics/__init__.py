"""What can be measured on pictures and how sure one can be of it."""
