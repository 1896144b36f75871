"""Reports on the findings of reconcile runs."""
