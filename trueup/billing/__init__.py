"""The public face: `trueup.billing.utils` and `trueup.billing.decorators`, as the specification names them."""
