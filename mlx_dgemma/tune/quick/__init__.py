"""A model made quicker by its own answers: `distill` trains an adapter, `calibrate` fits the stop rules."""
