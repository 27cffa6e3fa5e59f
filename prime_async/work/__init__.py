"""The torch side: model, data, inner and outer optimiser, codec, reduce."""
