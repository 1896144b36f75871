"""The HTTP views. Each one parses the request, calls one function of a lower package and renders the answer."""
