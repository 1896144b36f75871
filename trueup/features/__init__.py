"""What the AI features do: pure services, text in, typed result out."""
