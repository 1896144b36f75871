"""The processes of `trueup up`: started, watched and stopped together."""
