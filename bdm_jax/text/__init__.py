"""From prompts to `Conditioning`: tokenizers, windows for long prompts, text encoders."""
