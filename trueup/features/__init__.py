"""The AI features as services: they take text and a model, and return a typed result."""
