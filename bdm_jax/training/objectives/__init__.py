"""One file per trainable thing."""
