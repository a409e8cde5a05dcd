"""A scored corpus before training: what PEAR would do with it, in numbers and on a page."""
