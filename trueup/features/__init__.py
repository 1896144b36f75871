"""What the AI features do: the metered model client and pure services, text in, typed result out."""
