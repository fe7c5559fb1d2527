"""The bundled data set: emoji artwork with Chinese and English names."""
