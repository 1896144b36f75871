"""Status figures and alerts for operators."""
