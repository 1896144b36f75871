"""The live page for operators: what is at stake now, and the decisions of a person. It needs no other server."""
