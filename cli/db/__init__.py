"""`trueup db`: set a database up, attach to a host, leave it."""
