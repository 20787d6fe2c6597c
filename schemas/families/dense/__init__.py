"""Decoders without experts whose names are Llama's, or nearly."""
