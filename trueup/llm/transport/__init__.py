"""HTTP clients for the makers' SDKs: each call is capped to the running hold and recorded once."""
