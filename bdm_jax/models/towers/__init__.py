"""Text and vision encoders."""
