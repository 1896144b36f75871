"""The specification's public modules: `trueup.billing.utils` and `trueup.billing.decorators`."""
