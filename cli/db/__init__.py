"""`trueup db`: set a database up, attach trueup to a host, or detach it."""
