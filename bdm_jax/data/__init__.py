"""Record sources, captions and the bundled bilingual emoji data set."""
