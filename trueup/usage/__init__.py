"""What was used: charges, the usage log, the outbox."""
