"""Products of a web page, from its structured data, which costs nothing, or else from its text by the model."""
