"""The HTTP views: parse, call one function of a room below, answer."""
