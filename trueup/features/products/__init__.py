"""Products of a web page: from its structured data, which costs nothing, else from its text by the model."""
