"""Images to latents and back: the autoencoder, tiles, precomputed moments."""
