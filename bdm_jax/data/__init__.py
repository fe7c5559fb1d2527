"""Record sources, captions and the bundled bilingual emoji set."""
