"""May this run? The decision, holds, provider calls, and how strict the gate is."""
