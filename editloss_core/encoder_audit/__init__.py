"""Which encoder sees which failure, measured on one's own pairs."""
