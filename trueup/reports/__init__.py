"""Reports of what reconciling found."""
